# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""The forward kernel of softmax cross-attention, and what it shares with those of gradients.

Tiles of tokens of all slots, heads and samples are one list of works that a limited number of
programs goes through: number ``pid`` has works pid, pid + programs, and so on, some of which are
beyond the end of a slot shorter than others. No scores are stored. Scores are kept in base 2:
s = q . k * scale * log2(e), p = 2^(s - max). They are summed over the channels of a head in steps
of BK; values have two pieces of channels instead of one padded one. D and V are the widths of a
head.

``forward_kernel``: online softmax of a tile of queries of one output over the tiles of all its
sources, one after the other: a joint group is one long source. Leaves the log-sum-exp (natural).
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.engines.triton.maths import dot, extent, slot_offsets, slot_tokens

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place_of(work, tiles, batch_size, HEADS: tl.constexpr):
    """Tile, head, sample and slot of a work."""
    batch = (work // tiles // HEADS) % batch_size
    slot = work // tiles // HEADS // batch_size
    return work % tiles, (work // tiles) % HEADS, batch, slot


@triton.jit
def _place(
    table,
    row,
    batch,
    start,
    c,
    n,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    MINOR: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Pointers to channels ``start + c`` of tokens ``n``."""
    offset = batch.to(tl.int64) * tl.load(table + row + 1) + start * tl.load(table + row + 2)
    address = tl.load(table + row) + offset * SIZE
    base = tl.multiple_of(address.to(tl.pointer_type(DT)), VECTOR * SIZE)
    return base + slot_offsets(table, row, c[:, None], n[None, :], MINOR, VECTOR, WIDE)


@triton.jit
def head_tile(
    table,
    row,
    batch,
    head,
    c,
    n,
    valid,
    WIDTH: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    MINOR: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A float32 tile of a head; 0 outside of it."""
    place = _place(table, row, batch, head * WIDTH, c, n, DT, SIZE, MINOR, VECTOR, WIDE)
    return tl.load(place, mask=(c < WIDTH)[:, None] & valid[None, :], other=0.0).to(tl.float32)


@triton.jit
def put_head(
    table,
    row,
    batch,
    head,
    c,
    n,
    valid,
    x,
    WIDTH: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    MINOR: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write a tile x (tokens, channels) of a head; nothing where the slot has address 0."""
    if tl.load(table + row) != 0:
        place = _place(table, row, batch, head * WIDTH, c, n, DT, SIZE, MINOR, VECTOR, WIDE)
        tl.store(place, tl.trans(x).to(DT), mask=(c < WIDTH)[:, None] & valid[None, :])


@triton.jit
def times_tile(
    p,
    acc,
    table,
    row,
    batch,
    head,
    c,
    n,
    valid,
    WIDTH: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    MINOR: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """acc[m, c] + sum over the tokens of a tile x of p[m, n] x[c, n]."""
    x = head_tile(table, row, batch, head, c, n, valid, WIDTH, DT, SIZE, MINOR, VECTOR, WIDE)
    return dot(p, tl.trans(x), acc, DOT)


@triton.jit
def _inner_step(
    table,
    left,
    m,
    m_valid,
    right,
    n,
    n_valid,
    batch,
    head,
    acc,
    k,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    L_MINOR: tl.constexpr,
    L_VECTOR: tl.constexpr,
    L_WIDE: tl.constexpr,
    R_MINOR: tl.constexpr,
    R_VECTOR: tl.constexpr,
    R_WIDE: tl.constexpr,
):
    c = k + tl.arange(0, BK)
    a = head_tile(
        table, left, batch, head, c, m, m_valid, WIDTH, DT, SIZE, L_MINOR, L_VECTOR, L_WIDE
    )
    b = head_tile(
        table, right, batch, head, c, n, n_valid, WIDTH, DT, SIZE, R_MINOR, R_VECTOR, R_WIDE
    )
    return dot(tl.trans(a), b, acc, DOT)


@triton.jit
def inner_products(
    table,
    left,
    m,
    m_valid,
    right,
    n,
    n_valid,
    batch,
    head,
    acc,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    UNROLL: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    L_MINOR: tl.constexpr,
    L_VECTOR: tl.constexpr,
    L_WIDE: tl.constexpr,
    R_MINOR: tl.constexpr,
    R_VECTOR: tl.constexpr,
    R_WIDE: tl.constexpr,
):
    """acc[m, n] + sum over the channels of a head of left[c, m] right[c, n]."""
    if UNROLL:  # what does not change from step to step of a loop around stays in registers
        for k in tl.static_range(0, WIDTH, BK):
            acc = _inner_step(
                table, left, m, m_valid, right, n, n_valid, batch, head, acc, k, WIDTH, BK, DOT,
                DT, SIZE, L_MINOR, L_VECTOR, L_WIDE, R_MINOR, R_VECTOR, R_WIDE,
            )  # fmt: skip
    else:
        for k in range(0, WIDTH, BK):
            acc = _inner_step(
                table, left, m, m_valid, right, n, n_valid, batch, head, acc, k, WIDTH, BK, DOT,
                DT, SIZE, L_MINOR, L_VECTOR, L_WIDE, R_MINOR, R_VECTOR, R_WIDE,
            )  # fmt: skip
    return acc


@triton.jit(
    do_not_specialize=[
        "queries", "keys", "values", "outputs", "lists", "lse", "batch_size", "tiles",
        "works", "scale",
    ]
)  # fmt: skip
def forward_kernel(
    table,
    queries: tl.int32,
    keys: tl.int32,
    values: tl.int32,
    outputs: tl.int32,
    lists: tl.int32,
    lse: tl.int32,
    batch_size: tl.int32,
    tiles: tl.int32,
    works: tl.int32,
    scale: tl.float32,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
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
    O_MINOR: tl.constexpr,
    O_VECTOR: tl.constexpr,
    O_WIDE: tl.constexpr,
):
    """Tiles of queries of one output, sample and head; ``queries`` has a row for every output."""
    for work in range(tl.program_id(0), works, tl.num_programs(0)):
        tile, head, batch, slot = place_of(work, tiles, batch_size, HEADS)
        query = queries + slot * 5
        tokens = extent(slot_tokens(table, query), Q_MINOR, Q_VECTOR)
        if tile * BM < tokens:
            m = tile * BM + tl.arange(0, BM)
            m_valid = m < tokens
            v0 = tl.arange(0, V0)
            acc0 = tl.zeros([BM, V0], tl.float32)
            if V1 > 0:
                v1 = V0 + tl.arange(0, V1)
                acc1 = tl.zeros([BM, V1], tl.float32)
            top = tl.full([BM], float("-inf"), tl.float32)
            total = tl.zeros([BM], tl.float32)
            first = tl.load(table + lists + slot).to(tl.int32)
            last = tl.load(table + lists + slot + 1).to(tl.int32)
            for member in range(first, last):
                source = tl.load(table + lists + member).to(tl.int32)
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
                    s = tl.where(n_valid[None, :], s * (scale * LOG2_E), float("-inf"))
                    higher = tl.maximum(top, tl.max(s, 1))
                    shift = tl.where(higher == float("-inf"), 0.0, higher)
                    p = tl.exp2(s - shift[:, None])
                    alpha = tl.exp2(top - shift)
                    top = higher
                    total = total * alpha + tl.sum(p, 1)
                    acc0 = times_tile(
                        p, acc0 * alpha[:, None], table, value, batch, head, v0, n, n_valid, V, DOT,
                        DT, SIZE, V_MINOR, V_VECTOR, V_WIDE,
                    )  # fmt: skip
                    if V1 > 0:
                        acc1 = times_tile(
                            p, acc1 * alpha[:, None], table, value, batch, head, v1, n, n_valid, V,
                            DOT, DT, SIZE, V_MINOR, V_VECTOR, V_WIDE,
                        )  # fmt: skip
            divisor = tl.where(total == 0.0, 1.0, total)
            output = outputs + slot * 5
            put_head(
                table, output, batch, head, v0, m, m_valid, acc0 / divisor[:, None], V, DT, SIZE,
                O_MINOR, O_VECTOR, O_WIDE,
            )  # fmt: skip
            if V1 > 0:
                put_head(
                    table, output, batch, head, v1, m, m_valid, acc1 / divisor[:, None], V, DT,
                    SIZE, O_MINOR, O_VECTOR, O_WIDE,
                )  # fmt: skip
            result = tl.load(table + lse + slot).to(tl.pointer_type(tl.float32))
            result += (batch.to(tl.int64) * HEADS + head) * tokens
            tl.store(result + m, (top + tl.log2(divisor)) * LN_2, mask=m_valid)
