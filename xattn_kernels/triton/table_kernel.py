# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""A kernel that writes its arguments to memory: the only copy from the host that a graph keeps."""

from __future__ import annotations

import triton
import triton.language as tl

#: Numbers that one launch writes.
ARGUMENTS = 64


@triton.jit(do_not_specialize=["start", *(f"a{i}" for i in range(64))])
def write_kernel(
    table,
    start: tl.int32,
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
    a32: tl.int64,
    a33: tl.int64,
    a34: tl.int64,
    a35: tl.int64,
    a36: tl.int64,
    a37: tl.int64,
    a38: tl.int64,
    a39: tl.int64,
    a40: tl.int64,
    a41: tl.int64,
    a42: tl.int64,
    a43: tl.int64,
    a44: tl.int64,
    a45: tl.int64,
    a46: tl.int64,
    a47: tl.int64,
    a48: tl.int64,
    a49: tl.int64,
    a50: tl.int64,
    a51: tl.int64,
    a52: tl.int64,
    a53: tl.int64,
    a54: tl.int64,
    a55: tl.int64,
    a56: tl.int64,
    a57: tl.int64,
    a58: tl.int64,
    a59: tl.int64,
    a60: tl.int64,
    a61: tl.int64,
    a62: tl.int64,
    a63: tl.int64,
):
    """table[start + i] = a_i."""
    row = table + start
    tl.store(row + 0, a0)
    tl.store(row + 1, a1)
    tl.store(row + 2, a2)
    tl.store(row + 3, a3)
    tl.store(row + 4, a4)
    tl.store(row + 5, a5)
    tl.store(row + 6, a6)
    tl.store(row + 7, a7)
    tl.store(row + 8, a8)
    tl.store(row + 9, a9)
    tl.store(row + 10, a10)
    tl.store(row + 11, a11)
    tl.store(row + 12, a12)
    tl.store(row + 13, a13)
    tl.store(row + 14, a14)
    tl.store(row + 15, a15)
    tl.store(row + 16, a16)
    tl.store(row + 17, a17)
    tl.store(row + 18, a18)
    tl.store(row + 19, a19)
    tl.store(row + 20, a20)
    tl.store(row + 21, a21)
    tl.store(row + 22, a22)
    tl.store(row + 23, a23)
    tl.store(row + 24, a24)
    tl.store(row + 25, a25)
    tl.store(row + 26, a26)
    tl.store(row + 27, a27)
    tl.store(row + 28, a28)
    tl.store(row + 29, a29)
    tl.store(row + 30, a30)
    tl.store(row + 31, a31)
    tl.store(row + 32, a32)
    tl.store(row + 33, a33)
    tl.store(row + 34, a34)
    tl.store(row + 35, a35)
    tl.store(row + 36, a36)
    tl.store(row + 37, a37)
    tl.store(row + 38, a38)
    tl.store(row + 39, a39)
    tl.store(row + 40, a40)
    tl.store(row + 41, a41)
    tl.store(row + 42, a42)
    tl.store(row + 43, a43)
    tl.store(row + 44, a44)
    tl.store(row + 45, a45)
    tl.store(row + 46, a46)
    tl.store(row + 47, a47)
    tl.store(row + 48, a48)
    tl.store(row + 49, a49)
    tl.store(row + 50, a50)
    tl.store(row + 51, a51)
    tl.store(row + 52, a52)
    tl.store(row + 53, a53)
    tl.store(row + 54, a54)
    tl.store(row + 55, a55)
    tl.store(row + 56, a56)
    tl.store(row + 57, a57)
    tl.store(row + 58, a58)
    tl.store(row + 59, a59)
    tl.store(row + 60, a60)
    tl.store(row + 61, a61)
    tl.store(row + 62, a62)
    tl.store(row + 63, a63)
