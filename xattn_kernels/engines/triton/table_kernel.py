# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Tables written by kernels from their arguments: the only copy from the host that a graph keeps.

* ``write_kernel`` writes its arguments, whatever they are.
* ``complete_table`` is for the first kernel of an operator, which so needs no launch before it: a
  table made from a template, which depends on shapes alone, and the addresses of this call.
"""

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


#: Addresses that a kernel takes to complete a table, and the names of these arguments.
BASES = 32
BASE_NAMES = tuple(f"a{i}" for i in range(BASES))


@triton.jit
def complete_table(
    table,
    template,
    length,
    a0,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    a8,
    a9,
    a10,
    a11,
    a12,
    a13,
    a14,
    a15,
    a16,
    a17,
    a18,
    a19,
    a20,
    a21,
    a22,
    a23,
    a24,
    a25,
    a26,
    a27,
    a28,
    a29,
    a30,
    a31,
):
    """Copy a template, where -1 - (i + 32 k) stands for an address k bytes behind the i-th base.

    Every program does so by itself and then sees what it has written: all write the same.
    """
    for start in range(0, length, 128):
        place = start + tl.arange(0, 128)
        value = tl.load(template + place, mask=place < length, other=0)
        code = -1 - value
        number = code % 32
        base = tl.zeros([128], tl.int64)
        base = tl.where(number == 0, a0, base)
        base = tl.where(number == 1, a1, base)
        base = tl.where(number == 2, a2, base)
        base = tl.where(number == 3, a3, base)
        base = tl.where(number == 4, a4, base)
        base = tl.where(number == 5, a5, base)
        base = tl.where(number == 6, a6, base)
        base = tl.where(number == 7, a7, base)
        base = tl.where(number == 8, a8, base)
        base = tl.where(number == 9, a9, base)
        base = tl.where(number == 10, a10, base)
        base = tl.where(number == 11, a11, base)
        base = tl.where(number == 12, a12, base)
        base = tl.where(number == 13, a13, base)
        base = tl.where(number == 14, a14, base)
        base = tl.where(number == 15, a15, base)
        base = tl.where(number == 16, a16, base)
        base = tl.where(number == 17, a17, base)
        base = tl.where(number == 18, a18, base)
        base = tl.where(number == 19, a19, base)
        base = tl.where(number == 20, a20, base)
        base = tl.where(number == 21, a21, base)
        base = tl.where(number == 22, a22, base)
        base = tl.where(number == 23, a23, base)
        base = tl.where(number == 24, a24, base)
        base = tl.where(number == 25, a25, base)
        base = tl.where(number == 26, a26, base)
        base = tl.where(number == 27, a27, base)
        base = tl.where(number == 28, a28, base)
        base = tl.where(number == 29, a29, base)
        base = tl.where(number == 30, a30, base)
        base = tl.where(number == 31, a31, base)
        value = tl.where(value < 0, base + code // 32, value)
        tl.store(table + place, value, mask=place < length)
    tl.debug_barrier()
