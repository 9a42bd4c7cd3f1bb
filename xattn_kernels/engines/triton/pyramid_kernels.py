# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Kernels of the pyramid projection, forward. Tiles are (tokens, channels).

Weights (M, C) are slots whose "channels" are M and whose "tokens" are C. ``PM`` is M rounded up to
whole blocks of BH: the products of the coarse levels are rows of PM numbers, side by side, of which
those past M are 0, so that they can be read without masks.

* ``project_kernel``: W_s x_s of all coarse levels, each at its own resolution.
* ``pixel_kernel``: a tile of pixels of the finest level. For one block of hidden channels after the
  other it interpolates the coarse products, adds the product of the finest level, normalises,
  activates and adds to the classifier's sums: z is never stored, unless STORE asks for it. Without
  PROJECT it reads z instead; MOMENTS has it keep mean and squared deviations of its pixels.
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
    slot_base,
    slot_offsets,
    slot_tokens,
    store_tile,
)


@triton.jit(do_not_specialize=["features", "weights", "products", "starts", "levels"])
def project_kernel(
    table,
    features: tl.int32,
    weights: tl.int32,
    products: tl.int32,
    starts: tl.int32,
    levels: tl.int32,
    M: tl.constexpr,
    PM: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    DW: tl.constexpr,
    DW_SIZE: tl.constexpr,
    X_MINOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    X_WIDE: tl.constexpr,
    W_MINOR: tl.constexpr,
    W_VECTOR: tl.constexpr,
    W_WIDE: tl.constexpr,
    P_WIDE: tl.constexpr,
):
    """products[level] (B, N, PM) in the type of the weights; the first program of each level is
    at ``starts``."""
    BLOCKS: tl.constexpr = PM // BH
    pid = tl.program_id(0)
    level = 0
    for i in range(1, levels):
        level += (pid >= tl.load(table + starts + i)).to(tl.int32)
    pid -= tl.load(table + starts + level).to(tl.int32)
    source = features + level * 5
    weight = weights + level * 5
    product = products + level * 5
    tokens = slot_tokens(table, source)
    channels = slot_tokens(table, weight)
    tiles = (tokens + BN - 1) // BN
    h = (pid % BLOCKS) * BH + tl.arange(0, BH)
    n = (pid // BLOCKS % tiles) * BN + tl.arange(0, BN)
    batch = pid // BLOCKS // tiles
    valid = n < extent(tokens, X_MINOR, X_VECTOR)
    x = slot_base(table, source, batch, DT, SIZE, X_VECTOR)
    w = slot_base(table, weight, batch * 0, DW, DW_SIZE, W_VECTOR)
    acc = tl.zeros([BN, BH], tl.float32)
    for k in range(0, channels, BK):
        c = k + tl.arange(0, BK)
        x_end = channels
        if X_MINOR == "c":
            x_end = extent(channels, "n", X_VECTOR)
        x_offsets = slot_offsets(table, source, c[None, :], n[:, None], X_MINOR, X_VECTOR, X_WIDE)
        x_tile = tl.load(x + x_offsets, mask=valid[:, None] & (c < x_end)[None, :], other=0.0)
        w_end = extent(channels, W_MINOR, W_VECTOR)
        w_offsets = slot_offsets(table, weight, h[None, :], c[:, None], W_MINOR, W_VECTOR, W_WIDE)
        w_tile = tl.load(w + w_offsets, mask=(h < M)[None, :] & (c < w_end)[:, None], other=0.0)
        acc = dot(x_tile.to(tl.float32), w_tile.to(tl.float32), acc, DOT)
    out = slot_base(table, product, batch, DW, DW_SIZE, 16)
    rows = n
    if P_WIDE:
        rows = n.to(tl.int64)
    tl.store(out + rows[:, None] * PM + h[None, :], acc.to(DW), mask=valid[:, None])


@triton.jit
def _axis(j, length, size):
    """Where sample ``j`` of ``length`` lies among ``size`` ones (align_corners=False).

    Returns:
        The sample before it, 1 if there is one after that, else 0, and the share of the latter.
    """
    position = (2 * j.to(tl.int64) + 1) * size - length
    position = tl.where(position < 0, 0, position)
    first = position // (2 * length)
    rest = (position - first * 2 * length).to(tl.float32)
    inside = first + 1 < size
    share = tl.where(inside, rest / (2 * length).to(tl.float32), 0.0)
    return first.to(tl.int32), inside.to(tl.int32), share


@triton.jit
def _taps(table, geometry, n, height, width):
    """The four pixels of a level that pixels ``n`` of the finest one lie between.

    Returns:
        The first of them, the steps to the next row and column, and the shares of these.
    """
    rows = tl.load(table + geometry)
    columns = tl.load(table + geometry + 1)
    y, down, share_y = _axis(n // width, height, rows)
    x, right, share_x = _axis(n % width, width, columns)
    columns = columns.to(tl.int32)
    return y * columns + x, down * columns, right, share_y, share_x


@triton.jit
def _interpolate(
    base, h, first, down, right, share_y, share_x, PM: tl.constexpr, P_WIDE: tl.constexpr
):
    """A tile of a level's products between its pixels."""
    if P_WIDE:
        first = first.to(tl.int64)
        down = down.to(tl.int64)
        right = right.to(tl.int64)
    at = base + (first * PM)[:, None] + h[None, :]
    down = (down * PM)[:, None]
    right = (right * PM)[:, None]
    share_x = share_x[:, None]
    share_y = share_y[:, None]
    upper = (1.0 - share_x) * tl.load(at).to(tl.float32)
    upper += share_x * tl.load(at + right).to(tl.float32)
    lower = (1.0 - share_x) * tl.load(at + down).to(tl.float32)
    lower += share_x * tl.load(at + down + right).to(tl.float32)
    return (1.0 - share_y) * upper + share_y * lower


@triton.jit(
    do_not_specialize=[
        "feature", "weight", "products", "geometry", "classifier", "map", "output",
        "batch_size", "tiles", "height", "width"
    ]
)  # fmt: skip
def pixel_kernel(
    table,
    scale,
    shift,
    bias,
    moments,
    feature: tl.int32,
    weight: tl.int32,
    products: tl.int32,
    geometry: tl.int32,
    classifier: tl.int32,
    map: tl.int32,
    output: tl.int32,
    batch_size: tl.int32,
    tiles: tl.int32,
    height: tl.int32,
    width: tl.int32,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    M: tl.constexpr,
    PM: tl.constexpr,
    CO: tl.constexpr,
    O0: tl.constexpr,
    O1: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    LEVELS: tl.constexpr,
    PROJECT: tl.constexpr,
    STORE: tl.constexpr,
    MOMENTS: tl.constexpr,
    CLASSIFY: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    DW: tl.constexpr,
    DW_SIZE: tl.constexpr,
    X_MINOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    X_WIDE: tl.constexpr,
    W_MINOR: tl.constexpr,
    W_VECTOR: tl.constexpr,
    W_WIDE: tl.constexpr,
    V_MINOR: tl.constexpr,
    V_VECTOR: tl.constexpr,
    V_WIDE: tl.constexpr,
    Z_MINOR: tl.constexpr,
    Z_VECTOR: tl.constexpr,
    Z_WIDE: tl.constexpr,
    Y_MINOR: tl.constexpr,
    Y_VECTOR: tl.constexpr,
    Y_WIDE: tl.constexpr,
    P_WIDE: tl.constexpr,
    N_VECTOR: tl.constexpr,
):
    """A tile of pixels of a sample; some of the outputs where these are many.

    The pixels of a sample are a multiple of N_VECTOR.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    batch = (pid // tiles) % batch_size
    group = pid // tiles // batch_size
    tokens = height * width
    n = tile * BN + tl.arange(0, BN)
    valid = n < multiple(tokens, N_VECTOR)
    c0 = tl.arange(0, C0)
    c1 = c0
    o0 = group * (O0 + O1) + tl.arange(0, O0)
    o1 = o0
    if PROJECT:
        x0 = load_tile(table, feature, batch, c0, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE)
        x0 = tl.trans(x0)
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
            x1 = load_tile(
                table, feature, batch, c1, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
            )
            x1 = tl.trans(x1)
        at = tl.minimum(n, tokens - 1)
        if LEVELS > 1:
            first1, down1, right1, y1, x_1 = _taps(table, geometry, at, height, width)
            base1 = slot_base(table, products, batch, DW, DW_SIZE, 16)
        if LEVELS > 2:
            first2, down2, right2, y2, x_2 = _taps(table, geometry + 2, at, height, width)
            base2 = slot_base(table, products + 5, batch, DW, DW_SIZE, 16)
        if LEVELS > 3:
            first3, down3, right3, y3, x_3 = _taps(table, geometry + 4, at, height, width)
            base3 = slot_base(table, products + 10, batch, DW, DW_SIZE, 16)
    if CLASSIFY:
        out0 = tl.zeros([BN, O0], tl.float32)
        out0 += tl.load(bias + o0, mask=o0 < CO, other=0.0)[None, :]
        if O1 > 0:
            o1 = group * (O0 + O1) + O0 + tl.arange(0, O1)
            out1 = tl.zeros([BN, O1], tl.float32)
            out1 += tl.load(bias + o1, mask=o1 < CO, other=0.0)[None, :]
    for start in range(0, M, BH):
        h = start + tl.arange(0, BH)
        if PROJECT:
            z = tl.zeros([BN, BH], tl.float32)
            if LEVELS > 1:
                z += _interpolate(base1, h, first1, down1, right1, y1, x_1, PM, P_WIDE)
            if LEVELS > 2:
                z += _interpolate(base2, h, first2, down2, right2, y2, x_2, PM, P_WIDE)
            if LEVELS > 3:
                z += _interpolate(base3, h, first3, down3, right3, y3, x_3, PM, P_WIDE)
            w0 = load_tile(
                table, weight, batch * 0, h, c0, c0 < C, M, DW, DW_SIZE, W_MINOR, W_VECTOR, W_WIDE
            )
            z = dot(x0, tl.trans(w0), z, DOT)
            if C1 > 0:
                w1 = load_tile(
                    table,
                    weight,
                    batch * 0,
                    h,
                    c1,
                    c1 < C,
                    M,
                    DW,
                    DW_SIZE,
                    W_MINOR,
                    W_VECTOR,
                    W_WIDE,
                )
                z = dot(x1, tl.trans(w1), z, DOT)
        else:
            z = load_tile(table, map, batch, h, n, valid, M, DT, SIZE, Z_MINOR, Z_VECTOR, Z_WIDE)
            z = tl.trans(z)
        if STORE:
            store_tile(
                table, map, batch, h, n, valid, tl.trans(z), M, DT, SIZE, Z_MINOR, Z_VECTOR, Z_WIDE
            )
        if MOMENTS:
            count = tl.minimum(tokens - tile * BN, BN).to(tl.float32)
            mean = tl.sum(tl.where(valid[:, None], z, 0.0), 0) / count
            apart = tl.where(valid[:, None], z - mean[None, :], 0.0)
            place = moments + (batch * tiles + tile).to(tl.int64) * 2 * M
            tl.store(place + h, mean, mask=h < M)
            tl.store(place + M + h, tl.sum(apart * apart, 0), mask=h < M)
        if CLASSIFY:
            factor = tl.load(scale + h, mask=h < M, other=0.0)
            offset = tl.load(shift + h, mask=h < M, other=0.0)
            active = relu(z * factor[None, :] + offset[None, :])
            v0 = load_tile(
                table,
                classifier,
                batch * 0,
                o0,
                h,
                h < M,
                CO,
                DW,
                DW_SIZE,
                V_MINOR,
                V_VECTOR,
                V_WIDE,
            )
            out0 = dot(active, tl.trans(v0), out0, DOT)
            if O1 > 0:
                v1 = load_tile(
                    table,
                    classifier,
                    batch * 0,
                    o1,
                    h,
                    h < M,
                    CO,
                    DW,
                    DW_SIZE,
                    V_MINOR,
                    V_VECTOR,
                    V_WIDE,
                )
                out1 = dot(active, tl.trans(v1), out1, DOT)
    if CLASSIFY:
        store_tile(
            table, output, batch, o0, n, valid, tl.trans(out0), CO, DT, SIZE, Y_MINOR, Y_VECTOR,
            Y_WIDE,
        )  # fmt: skip
        if O1 > 0:
            store_tile(
                table, output, batch, o1, n, valid, tl.trans(out1), CO, DT, SIZE, Y_MINOR, Y_VECTOR,
                Y_WIDE,
            )  # fmt: skip
