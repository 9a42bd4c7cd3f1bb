# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Kernels of the gradients of softmax cross-attention: scores are computed anew, and not stored.

* ``delta_kernel``: g . out - h for every query, with h the gradient of the log-sum-exp.
* ``query_gradient_kernel``: dq of a tile of queries, over the outputs of a query and their sources.
* ``source_gradient_kernel``: dk and dv of a tile of keys, over the outputs that read a source; one
  of them a launch where both are too wide for the registers.

Every sum is made by one program in one order: nothing is added atomically, results repeat.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.engines.triton.maths import extent, slot_tokens
from xattn_kernels.engines.triton.softmax_kernels import (
    LOG2_E,
    head_tile,
    inner_products,
    place_of,
    put_head,
    times_tile,
)


@triton.jit(
    do_not_specialize=[
        "outputs", "gradients", "lse_gradients", "batch_size", "tiles", "longest"
    ]
)  # fmt: skip
def delta_kernel(
    table,
    delta,
    outputs: tl.int32,
    gradients: tl.int32,
    lse_gradients: tl.int32,
    batch_size: tl.int32,
    tiles: tl.int32,
    longest: tl.int32,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    O_MINOR: tl.constexpr,
    O_VECTOR: tl.constexpr,
    O_WIDE: tl.constexpr,
    G_MINOR: tl.constexpr,
    G_VECTOR: tl.constexpr,
    G_WIDE: tl.constexpr,
):
    """delta[output, b, head]: g . out - h of a tile of queries."""
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % HEADS
    batch = (pid // tiles // HEADS) % batch_size
    slot = pid // tiles // HEADS // batch_size
    tokens = extent(slot_tokens(table, outputs + slot * 5), O_MINOR, O_VECTOR)
    if tile * BM < tokens:
        m = tile * BM + tl.arange(0, BM)
        present = m < extent(slot_tokens(table, gradients + slot * 5), G_MINOR, G_VECTOR)
        total = tl.zeros([BM], tl.float32)
        for k in range(0, V, BK):
            c = k + tl.arange(0, BK)
            out = head_tile(
                table, outputs + slot * 5, batch, head, c, m, present, V, DT, SIZE, O_MINOR,
                O_VECTOR, O_WIDE,
            )  # fmt: skip
            g = head_tile(
                table, gradients + slot * 5, batch, head, c, m, present, V, DT, SIZE, G_MINOR,
                G_VECTOR, G_WIDE,
            )  # fmt: skip
            total += tl.sum(out * g, 0)
        row = batch.to(tl.int64) * HEADS + head
        address = tl.load(table + lse_gradients + slot)
        if address != 0:
            place = address.to(tl.pointer_type(tl.float32)) + row * tokens + m
            total -= tl.load(place, mask=m < tokens, other=0.0)
        row += slot.to(tl.int64) * batch_size * HEADS
        tl.store(delta + row * longest + m, total, mask=m < tokens)


@triton.jit(
    do_not_specialize=[
        "queries", "keys", "values", "gradients", "results", "by_query", "by_output", "lse",
        "batch_size", "tiles", "works", "longest", "scale",
    ]
)  # fmt: skip
def query_gradient_kernel(
    table,
    delta,
    queries: tl.int32,
    keys: tl.int32,
    values: tl.int32,
    gradients: tl.int32,
    results: tl.int32,
    by_query: tl.int32,
    by_output: tl.int32,
    lse: tl.int32,
    batch_size: tl.int32,
    tiles: tl.int32,
    works: tl.int32,
    longest: tl.int32,
    scale: tl.float32,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    Q_MINOR: tl.constexpr,
    Q_VECTOR: tl.constexpr,
    Q_WIDE: tl.constexpr,
    K_MINOR: tl.constexpr,
    K_VECTOR: tl.constexpr,
    K_WIDE: tl.constexpr,
    V_MINOR: tl.constexpr,
    V_VECTOR: tl.constexpr,
    V_WIDE: tl.constexpr,
    G_MINOR: tl.constexpr,
    G_VECTOR: tl.constexpr,
    G_WIDE: tl.constexpr,
    R_MINOR: tl.constexpr,
    R_VECTOR: tl.constexpr,
    R_WIDE: tl.constexpr,
):
    """Tiles of one query, sample and head."""
    for work in range(tl.program_id(0), works, tl.num_programs(0)):
        tile, head, batch, slot = place_of(work, tiles, batch_size, HEADS)
        query = queries + slot * 5
        result = results + slot * 5
        tokens = extent(slot_tokens(table, query), Q_MINOR, Q_VECTOR)
        if (tile * BM < tokens) and (tl.load(table + result) != 0):
            m = tile * BM + tl.arange(0, BM)
            m_valid = m < tokens
            d0 = tl.arange(0, D0)
            acc0 = tl.zeros([BM, D0], tl.float32)
            if D1 > 0:
                d1 = D0 + tl.arange(0, D1)
                acc1 = tl.zeros([BM, D1], tl.float32)
            row = batch.to(tl.int64) * HEADS + head
            for i in range(
                tl.load(table + by_query + slot).to(tl.int32),
                tl.load(table + by_query + slot + 1).to(tl.int32),
            ):
                output = tl.load(table + by_query + i).to(tl.int32)
                gradient = gradients + output * 5
                present = m < extent(slot_tokens(table, gradient), G_MINOR, G_VECTOR)
                place = tl.load(table + lse + output).to(tl.pointer_type(tl.float32)) + row * tokens
                top = tl.load(place + m, mask=m_valid, other=0.0) * LOG2_E
                place = delta + (output.to(tl.int64) * batch_size * HEADS + row) * longest
                less = tl.load(place + m, mask=m_valid, other=0.0)
                for j in range(
                    tl.load(table + by_output + output).to(tl.int32),
                    tl.load(table + by_output + output + 1).to(tl.int32),
                ):
                    source = tl.load(table + by_output + j).to(tl.int32)
                    key = keys + source * 5
                    value = values + source * 5
                    key_tokens = extent(slot_tokens(table, key), K_MINOR, K_VECTOR)
                    for n0 in range(0, key_tokens, BN):
                        n = n0 + tl.arange(0, BN)
                        n_valid = n < key_tokens
                        s = inner_products(
                            table, query, m, m_valid, key, n, n_valid, batch, head,
                            tl.zeros([BM, BN], tl.float32), D, BK, UNROLL, DOT, DT, SIZE,
                            Q_MINOR, Q_VECTOR, Q_WIDE, K_MINOR, K_VECTOR, K_WIDE,
                        )  # fmt: skip
                        p = tl.exp2(s * (scale * LOG2_E) - top[:, None])
                        dp = inner_products(
                            table, gradient, m, present, value, n, n_valid, batch, head,
                            tl.zeros([BM, BN], tl.float32), V, BK, UNROLL, DOT, DT, SIZE,
                            G_MINOR, G_VECTOR, G_WIDE, V_MINOR, V_VECTOR, V_WIDE,
                        )  # fmt: skip
                        ds = tl.where(n_valid[None, :], p * (dp - less[:, None]), 0.0)
                        acc0 = times_tile(
                            ds, acc0, table, key, batch, head, d0, n, n_valid, D, DOT, DT, SIZE,
                            K_MINOR, K_VECTOR, K_WIDE,
                        )  # fmt: skip
                        if D1 > 0:
                            acc1 = times_tile(
                                ds, acc1, table, key, batch, head, d1, n, n_valid, D, DOT, DT, SIZE,
                                K_MINOR, K_VECTOR, K_WIDE,
                            )  # fmt: skip
            put_head(
                table, result, batch, head, d0, m, m_valid, acc0 * scale, D, DT, SIZE,
                R_MINOR, R_VECTOR, R_WIDE,
            )  # fmt: skip
            if D1 > 0:
                put_head(
                    table, result, batch, head, d1, m, m_valid, acc1 * scale, D, DT, SIZE,
                    R_MINOR, R_VECTOR, R_WIDE,
                )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "queries", "keys", "values", "gradients", "key_results", "value_results", "by_source",
        "lse", "batch_size", "tiles", "works", "longest", "scale",
    ]
)  # fmt: skip
def source_gradient_kernel(
    table,
    delta,
    queries: tl.int32,
    keys: tl.int32,
    values: tl.int32,
    gradients: tl.int32,
    key_results: tl.int32,
    value_results: tl.int32,
    by_source: tl.int32,
    lse: tl.int32,
    batch_size: tl.int32,
    tiles: tl.int32,
    works: tl.int32,
    longest: tl.int32,
    scale: tl.float32,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,
    WITH_KEYS: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    Q_MINOR: tl.constexpr,
    Q_VECTOR: tl.constexpr,
    Q_WIDE: tl.constexpr,
    K_MINOR: tl.constexpr,
    K_VECTOR: tl.constexpr,
    K_WIDE: tl.constexpr,
    V_MINOR: tl.constexpr,
    V_VECTOR: tl.constexpr,
    V_WIDE: tl.constexpr,
    G_MINOR: tl.constexpr,
    G_VECTOR: tl.constexpr,
    G_WIDE: tl.constexpr,
    DK_MINOR: tl.constexpr,
    DK_VECTOR: tl.constexpr,
    DK_WIDE: tl.constexpr,
    DV_MINOR: tl.constexpr,
    DV_VECTOR: tl.constexpr,
    DV_WIDE: tl.constexpr,
):
    """dk, dv or both for tiles of one source, sample and head; ``queries`` are by output."""
    for work in range(tl.program_id(0), works, tl.num_programs(0)):
        tile, head, batch, slot = place_of(work, tiles, batch_size, HEADS)
        key = keys + slot * 5
        value = values + slot * 5
        key_tokens = extent(slot_tokens(table, key), K_MINOR, K_VECTOR)
        if tile * BN < key_tokens:
            n = tile * BN + tl.arange(0, BN)
            n_valid = n < key_tokens
            d0 = tl.arange(0, D0)
            v0 = tl.arange(0, V0)
            if WITH_KEYS:
                dk0 = tl.zeros([BN, D0], tl.float32)
            if WITH_VALUES:
                dv0 = tl.zeros([BN, V0], tl.float32)
            if WITH_KEYS and D1 > 0:
                d1 = D0 + tl.arange(0, D1)
                dk1 = tl.zeros([BN, D1], tl.float32)
            if WITH_VALUES and V1 > 0:
                v1 = V0 + tl.arange(0, V1)
                dv1 = tl.zeros([BN, V1], tl.float32)
            row = batch.to(tl.int64) * HEADS + head
            for i in range(
                tl.load(table + by_source + slot).to(tl.int32),
                tl.load(table + by_source + slot + 1).to(tl.int32),
            ):
                output = tl.load(table + by_source + i).to(tl.int32)
                query = queries + output * 5
                gradient = gradients + output * 5
                tokens = extent(slot_tokens(table, query), Q_MINOR, Q_VECTOR)
                with_gradient = extent(slot_tokens(table, gradient), G_MINOR, G_VECTOR)
                tops = tl.load(table + lse + output).to(tl.pointer_type(tl.float32)) + row * tokens
                lesses = delta + (output.to(tl.int64) * batch_size * HEADS + row) * longest
                for m0 in range(0, tokens, BM):
                    m = m0 + tl.arange(0, BM)
                    m_valid = m < tokens
                    present = m < with_gradient
                    top = tl.load(tops + m, mask=m_valid, other=0.0) * LOG2_E
                    less = tl.load(lesses + m, mask=m_valid, other=0.0)
                    s = inner_products(
                        table, key, n, n_valid, query, m, m_valid, batch, head,
                        tl.zeros([BN, BM], tl.float32), D, BK, UNROLL, DOT, DT, SIZE,
                        K_MINOR, K_VECTOR, K_WIDE, Q_MINOR, Q_VECTOR, Q_WIDE,
                    )  # fmt: skip
                    p = tl.exp2(s * (scale * LOG2_E) - top[None, :])
                    p = tl.where(m_valid[None, :], p, 0.0)
                    if WITH_VALUES:
                        dv0 = times_tile(
                            p, dv0, table, gradient, batch, head, v0, m, present, V, DOT, DT, SIZE,
                            G_MINOR, G_VECTOR, G_WIDE,
                        )  # fmt: skip
                        if V1 > 0:
                            dv1 = times_tile(
                                p, dv1, table, gradient, batch, head, v1, m, present, V, DOT, DT,
                                SIZE, G_MINOR, G_VECTOR, G_WIDE,
                            )  # fmt: skip
                    if WITH_KEYS:
                        dp = inner_products(
                            table, value, n, n_valid, gradient, m, present, batch, head,
                            tl.zeros([BN, BM], tl.float32), V, BK, UNROLL, DOT, DT, SIZE,
                            V_MINOR, V_VECTOR, V_WIDE, G_MINOR, G_VECTOR, G_WIDE,
                        )  # fmt: skip
                        ds = p * (dp - less[None, :])
                        dk0 = times_tile(
                            ds, dk0, table, query, batch, head, d0, m, m_valid, D, DOT, DT, SIZE,
                            Q_MINOR, Q_VECTOR, Q_WIDE,
                        )  # fmt: skip
                        if D1 > 0:
                            dk1 = times_tile(
                                ds, dk1, table, query, batch, head, d1, m, m_valid, D, DOT, DT,
                                SIZE, Q_MINOR, Q_VECTOR, Q_WIDE,
                            )  # fmt: skip
            if WITH_KEYS:
                result = key_results + slot * 5
                put_head(
                    table, result, batch, head, d0, n, n_valid, dk0 * scale, D, DT, SIZE,
                    DK_MINOR, DK_VECTOR, DK_WIDE,
                )  # fmt: skip
                if D1 > 0:
                    put_head(
                        table, result, batch, head, d1, n, n_valid, dk1 * scale, D, DT, SIZE,
                        DK_MINOR, DK_VECTOR, DK_WIDE,
                    )  # fmt: skip
            if WITH_VALUES:
                result = value_results + slot * 5
                put_head(
                    table, result, batch, head, v0, n, n_valid, dv0, V, DT, SIZE,
                    DV_MINOR, DV_VECTOR, DV_WIDE,
                )  # fmt: skip
                if V1 > 0:
                    put_head(
                        table, result, batch, head, v1, n, n_valid, dv1, V, DT, SIZE,
                        DV_MINOR, DV_VECTOR, DV_WIDE,
                    )  # fmt: skip
