# ruff: noqa: RET505 (a branch that is not taken at compile time must not be compiled)
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Device functions of all Triton kernels: views of slots, tiles, feature maps, matrix products.

Tiles are (channels, tokens). ``DOT`` says how products are computed: "ieee" in float32, "tf32" with
operands rounded to tf32, "bf16" with operands rounded to bfloat16; sums are in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiple(x, FACTOR: tl.constexpr):
    """x, of which the compiler knows from here on that it is a multiple of FACTOR."""
    return (x // FACTOR) * FACTOR


@triton.jit
def slot_tokens(table, row):
    """Tokens of a slot."""
    return tl.load(table + row + 4).to(tl.int32)


@triton.jit
def slot_base(table, row, batch, DT: tl.constexpr, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer to a sample of a slot, with the alignment that the host has seen."""
    address = tl.load(table + row) + batch.to(tl.int64) * tl.load(table + row + 1) * SIZE
    return tl.multiple_of(address.to(tl.pointer_type(DT)), VECTOR * SIZE)


@triton.jit
def slot_offsets(table, row, c, n, MINOR: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """Offsets in elements of channels ``c`` and tokens ``n``, broadcast against each other."""
    stride_c = tl.load(table + row + 2)
    stride_n = tl.load(table + row + 3)
    if WIDE:
        c = c.to(tl.int64)
        n = n.to(tl.int64)
    else:
        stride_c = stride_c.to(tl.int32)
        stride_n = stride_n.to(tl.int32)
    if MINOR == "n":
        return c * multiple(stride_c, VECTOR) + n
    elif MINOR == "c":
        return c + n * multiple(stride_n, VECTOR)
    else:
        return c * stride_c + n * stride_n


@triton.jit
def extent(tokens, MINOR: tl.constexpr, VECTOR: tl.constexpr):
    """The number of tokens, with what is known of it: masks of whole vectors need no tests."""
    if MINOR == "n":
        tokens = multiple(tokens, VECTOR)
    return tokens


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """exp(x) for x <= 0; with EXACT to a few units in the last place wherever x lies."""
    if EXACT:
        x = tl.where(x < -120.0, -120.0, x)
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        # ln 2 in two parts, of which n times the first is exact.
        f = (x - n * 0.693359375) + n * 2.12194440e-4
        return tl.exp2(f * 1.4426950408889634) * tl.exp2(n)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def log1p(u, EXACT: tl.constexpr):
    """log(1 + u) for 0 <= u <= 1 as 2 artanh(u / (2 + u)), without loss where u is small."""
    s = u / (2.0 + u)
    t = s * s
    if EXACT:
        p = 1.0 / 13.0 + t * (1.0 / 15.0)
        p = 1.0 / 11.0 + t * p
        p = 1.0 / 9.0 + t * p
    else:
        p = 1.0 / 9.0
    p = 1.0 / 7.0 + t * p
    p = 1.0 / 5.0 + t * p
    p = 1.0 / 3.0 + t * p
    return 2.0 * (s + s * (t * p))


@triton.jit
def softplus(x, EXACT: tl.constexpr):
    """log(1 + exp(x)); NaN stays."""
    u = exponential(tl.where(x < 0.0, x, -x), EXACT)
    return tl.where(x < 0.0, 0.0, x) + log1p(u, EXACT)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def feature_map(x, PHI: tl.constexpr, EXACT: tl.constexpr):
    """phi(x) in float32."""
    if PHI == "softplus":
        return softplus(x, EXACT)
    elif PHI == "relu":
        return relu(x)
    elif PHI == "elu":
        return tl.where(x > 0.0, x + 1.0, exponential(tl.where(x > 0.0, 0.0, x), EXACT))
    else:
        return x


@triton.jit
def feature_map_slope(x, PHI: tl.constexpr, EXACT: tl.constexpr):
    """The derivative of phi at x."""
    if PHI == "softplus":
        u = exponential(tl.where(x < 0.0, x, -x), EXACT)
        return tl.where(x < 0.0, u, 1.0) / (1.0 + u)
    elif PHI == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif PHI == "elu":
        return tl.where(x > 0.0, 1.0, exponential(tl.where(x > 0.0, 0.0, x), EXACT))
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def to_tf32(x):
    """x rounded to the nearest tf32 number, as the hardware would cut it off; NaN stays."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x1000) & -8192
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, DOT: tl.constexpr):
    """acc + a b for float32 tiles."""
    if DOT == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif DOT == "tf32":
        return tl.dot(to_tf32(a), to_tf32(b), acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(
    table,
    row,
    batch,
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
    """A float32 tile of channels ``c`` and tokens ``n`` of a slot; 0 outside of it."""
    base = slot_base(table, row, batch, DT, SIZE, VECTOR)
    offsets = slot_offsets(table, row, c[:, None], n[None, :], MINOR, VECTOR, WIDE)
    mask = (c < WIDTH)[:, None] & valid[None, :]
    return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    table,
    row,
    batch,
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
    """Write a tile, rounded to the type of the slot; nothing where the slot has address 0."""
    if tl.load(table + row) != 0:
        base = slot_base(table, row, batch, DT, SIZE, VECTOR)
        offsets = slot_offsets(table, row, c[:, None], n[None, :], MINOR, VECTOR, WIDE)
        mask = (c < WIDTH)[:, None] & valid[None, :]
        tl.store(base + offsets, x.to(DT), mask=mask)


@triton.jit
def map_tile(x, c, valid, WIDTH: tl.constexpr, PHI: tl.constexpr, DOT: tl.constexpr):
    """phi(x), and 0 outside of the slot."""
    mask = (c < WIDTH)[:, None] & valid[None, :]
    return tl.where(mask, feature_map(x, PHI, DOT == "ieee"), 0.0)
