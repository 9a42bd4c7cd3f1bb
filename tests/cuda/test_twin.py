"""The layer that runs CUDA kernels on the host: its primitives against computations of their own.

Fragments are put together here by the formulas of the PTX manual (matrix fragments of mma.m16n8k16
and mma.m16n8k8, and ldmatrix), and products are compared with those of whole matrices.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from twin import build

SEEDS = range(20)
LANES = torch.arange(32)


#: Kernels with a race, and the two accesses that it is between, by what stands in their lines.
RACES = {
    "rotate_early": ("void rotate(", "memory[i] =", "memory[(i + 1)"),
    "rotate_twice_early": ("void rotate_twice(", "memory[i] =", "memory[(i + 1)"),
    "rotate_warp_early": ("void rotate_warp(", "memory[i] =", "memory[(i + 1)"),
    "rotate_shuffled": ("rotate_shuffled_kernel", "memory[i] =", "memory[next]"),
    "load_early": ("load_early_kernel", "[thread_index()] = 0.0f", "load_matrices(r"),
    "copy_early": ("copy_early_kernel", "copy_async(mine", "+ 4) % 256]"),
    "wait_late": ("wait_late_kernel", "copy_async(shared", "+ 4) % 256]"),
}


def load(path: Path) -> Any:
    # Under a name of its own: pybind11 keeps one module of a name.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._selftest", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def module() -> Any:
    return load(build.build("_selftest", asan=False))


@pytest.fixture(autouse=True)
def settings(module: Any) -> None:
    module.twin_configure()


def run(module: Any, name: str, a: Any = None, b: Any = None, d: Any = None, **options: Any) -> Any:
    """Run a kernel of selftest.cu on tensors; returns ``d``."""
    given = {"a": a, "b": b, "d": d}
    pointers = {key: x.data_ptr() for key, x in given.items() if x is not None}
    module.run(name, **pointers, **options)
    return d


def refused(module: Any, name: str, *words: str, seeds: Any = (0, 1, 2), **options: Any) -> None:
    """A kernel fails whatever the order, and says all of ``words``."""
    for seed in seeds:
        module.twin_configure(seed=seed)
        with pytest.raises(RuntimeError) as caught:
            run(module, name, **options)
        for word in (f"{name}: ", *words):
            assert word in str(caught.value), str(caught.value)


def line_of(text: str, after: str) -> int:
    """The line of selftest.cu that has ``text`` first after the one that has ``after``."""
    lines = (build.TWIN / "selftest.cu").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if after in line)
    return next(i for i in range(start, len(lines)) if text in lines[i]) + 1


def test_every_name_of_the_device_is_there() -> None:
    def names(path: Path) -> set[str]:
        text = re.sub(r"//.*|asm.*?;\n", "", path.read_text())
        functions = re.findall(r"^(?:XATTN_DEVICE )?\w[\w *]* \*?(\w+)\(", text, re.M)
        return {*functions, *re.findall(r"#define (XATTN_\w+)", text)}

    device = names(build.CSRC / "cuda" / "device.h")
    assert {"sync_threads", "copy_async", "shuffle", "shared_memory", "XATTN_KERNEL"} <= device
    assert device <= names(build.TWIN / "twin.h")


@pytest.mark.parametrize(("works", "processors"), [(1, 3), (7, 3), (7, 1), (2, 8)])
def test_who_a_thread_is(module: Any, works: int, processors: int) -> None:
    module.twin_configure(processors=processors)
    d = torch.full((works, 64, 5), -1, dtype=torch.int32)
    run(module, "names", d=d, works=works, threads=64)
    blocks = min(works, processors)
    for work in range(works):
        for thread in range(64):
            expected = [thread, thread % 32, thread // 32, work % blocks, blocks * 100 + 2]
            assert d[work, thread].tolist() == expected
    assert module.twin_launches() == [("names", blocks, 64, 0)]


def test_nothing_to_do_is_no_launch(module: Any) -> None:
    run(module, "names", works=0)
    assert module.twin_launches() == []


def order(module: Any, seed: int, rounds: int, threads: int) -> list[int]:
    module.twin_configure(seed=seed, processors=3)
    d = torch.zeros(1 + 3 * threads * rounds, dtype=torch.int32)
    run(module, "order", d=d, number=rounds, works=3, threads=threads)
    return d[1:].tolist()


def test_order_is_the_seed_s_and_differs_between_seeds(module: Any) -> None:
    orders = {seed: order(module, seed, 3, 64) for seed in SEEDS}
    for seed, found in orders.items():
        assert found == order(module, seed, 3, 64)
        assert sorted(found) == sorted(
            block * 1000 + i for block in range(3) for i in range(64) for _ in range(3)
        )
    assert len({tuple(found) for found in orders.values()}) == len(SEEDS)
    # Blocks, warps and lanes all change places.
    assert {found[0] // 1000 for found in orders.values()} == {0, 1, 2}
    assert {found[0] % 1000 // 32 for found in orders.values()} == {0, 1}
    assert len({found[0] % 32 for found in orders.values()}) > 8


def test_the_next_launch_has_another_order(module: Any) -> None:
    module.twin_configure(seed=5)
    first, second = (
        run(module, "order", d=torch.zeros(33, dtype=torch.int32), number=1) for _ in "12"
    )
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("mask", [0, 1, 2, 4, 8, 16, 31])
def test_shuffle_xor(module: Any, mask: int) -> None:
    a = torch.randn(32, dtype=torch.float64)
    d = run(module, "shuffle_xor", a, d=torch.empty(64, dtype=torch.float64), number=mask)
    assert torch.equal(d[:32], a[LANES ^ mask])
    assert torch.equal(d[32:], a.float().double()[LANES ^ mask])


def test_shuffle(module: Any) -> None:
    a = torch.randn(32, dtype=torch.float64)
    source = (LANES * 7 + 3).remainder(29).int()
    d = run(module, "shuffle", a, source, torch.empty(32, dtype=torch.float64))
    assert torch.equal(d, a[source.long()])
    refused(module, "shuffle", "from lane 32", a=a, b=torch.full_like(source, 32), d=d)


@pytest.mark.parametrize("thread", [0, 31, 32, 63, 64])
def test_any(module: Any, thread: int) -> None:
    d = run(module, "any", d=torch.empty(64, dtype=torch.int32), number=thread, threads=64)
    assert d.tolist() == [int(i // 32 == thread // 32) for i in range(64)]


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(module: Any, transposed: bool) -> None:
    a = torch.arange(256, dtype=torch.int16)
    d = torch.empty(32, 4, dtype=torch.int32)
    run(module, "load", a, d=d, number=int(transposed), shared=512)
    matrices = a.view(4, 8, 8).mT if transposed else a.view(4, 8, 8)
    for lane in range(32):
        for i in range(4):
            low, high = matrices[i, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()
            assert d[lane, i].item() == low + 65536 * high


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (4, "is not a multiple of 16"),
        (32, "16 bytes at offset 512 are not in the block's shared memory of 512"),
        (-32, "16 bytes at offset -16 are not in"),
    ],
)
def test_load_matrices_refuses_addresses(module: Any, number: int, words: str) -> None:
    a, d = torch.arange(256, dtype=torch.int16), torch.empty(32, 4, dtype=torch.int32)
    refused(module, "load", words, a=a, d=d, number=number, shared=512, seeds=SEEDS)


@pytest.mark.parametrize(
    ("stride", "conflicts"), [(128, 28), (64, 12), (32, 4), (16, 0), (144, 0), (80, 0), (0, 0)]
)
def test_conflicts_of_banks_are_counted(module: Any, stride: int, conflicts: int) -> None:
    d = torch.empty(32, dtype=torch.int32)
    run(module, "stride", d=d, number=stride, shared=2048)
    nothing = {"products": 0, "shuffles": 0, "copied_bytes": 0}
    expected = {"name": "stride", "loads": 1, "conflicts": conflicts, **nothing}
    assert module.twin_counts() == [expected]


def test_what_warps_do_is_counted(module: Any) -> None:
    run(module, "products", d=torch.empty(32), number=7)
    run(module, "copy16", torch.ones(32, 4), d=torch.empty(32, 4), number=12, shared=512)
    run(module, "any", d=torch.empty(64, dtype=torch.int32), threads=64)
    counts = module.twin_counts()
    assert [c["products"] for c in counts] == [7, 0, 0]
    assert [c["copied_bytes"] for c in counts] == [0, 12 * 32, 0]
    assert [c["shuffles"] for c in counts] == [0, 0, 2]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def fragments(x: Tensor, row: Any, column: Any, registers: int, per: int) -> Tensor:
    """(32, registers) of 32 bits: x[row(lane, i), column(lane, i)] of all lanes."""
    elements = [
        [x[row(lane, i), column(lane, i)] for i in range(registers * per)]
        for lane in LANES.tolist()
    ]
    stacked = torch.stack([torch.stack(line) for line in elements])
    return stacked.view(torch.int32) if per == 2 else bits(stacked)


def row_of_d(lane: int, i: int) -> int:
    return lane >> 2 if i < 2 else (lane >> 2) + 8


def column_of_d(lane: int, i: int) -> int:
    return lane % 4 * 2 + (i & 1)


def multiply(module: Any, depth: int, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    of_d = fragments(d, row_of_d, column_of_d, 4, 1).view(torch.float32)
    run(module, "multiply", a, b, of_d, number=depth)
    result = torch.full((16, 8), torch.nan)
    for lane in range(32):
        for i in range(4):
            result[row_of_d(lane, i), column_of_d(lane, i)] = of_d[lane, i]
    return result


def test_multiply_bfloat16(module: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(16, 16, generator=generator).bfloat16()
    b = torch.randn(16, 8, generator=generator).bfloat16()
    d = torch.randn(16, 8, generator=generator)
    of_a = fragments(
        a,
        lambda lane, i: (lane >> 2) + (0 if i in (0, 1, 4, 5) else 8),
        lambda lane, i: lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0),
        *(4, 2),
    )
    of_b = fragments(
        b,
        lambda lane, i: lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0),
        lambda lane, i: lane >> 2,
        *(2, 2),
    )
    exact = d.double() + a.double() @ b.double()
    result = multiply(module, 16, of_a, of_b, d)
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-5)


def test_multiply_tf32(module: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((16, 8), (8, 8)))
    d = torch.randn(16, 8, generator=generator)

    def seen(x: Tensor) -> Tensor:
        """Without the 13 bits that the hardware does not look at."""
        return (x.view(torch.int32) >> 13 << 13).view(torch.float32).double()

    of_a = fragments(
        a,
        lambda lane, i: (lane >> 2) + (8 if i in (1, 3) else 0),
        lambda lane, i: lane % 4 + (4 if i >= 2 else 0),
        *(4, 1),
    )
    of_b = fragments(b, lambda lane, i: lane % 4 + 4 * i, lambda lane, i: lane >> 2, *(2, 1))
    result = multiply(module, 8, of_a, of_b, d)
    exact = d.double() + seen(a) @ seen(b)
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-5)
    assert (result.double() - d.double() - a.double() @ b.double()).abs().max() > 1e-4


def mapped(module: Any, name: str, a: Tensor) -> Tensor:
    d = torch.empty(a.numel(), dtype=torch.int32)
    return run(module, name, a, d=d, number=a.numel())


def floats() -> Tensor:
    """All signs and exponents, ties of every narrow type with neighbours, infinity, NaN."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).int()
    ties = drawn[:3000] & ~0x1FFF | 0x1000
    wide_ties = drawn[:3000] & ~0xFFFF | 0x8000
    special = torch.tensor(
        [0.0, -0.0, 1.0, 65504.0, 65519.99, 65520.0, torch.inf, -torch.inf, torch.nan]
    )
    small = torch.arange(0, 4096).float() * 2.0**-26
    groups = [drawn, ties, ties + 1, ties - 1, wide_ties, wide_ties + 1, wide_ties - 1]
    return torch.cat([*(x.view(torch.float32) for x in groups), special, small, -small])


def test_bfloat16(module: Any) -> None:
    x = floats()
    d = mapped(module, "bfloat16", x)
    low, high = d.view(torch.int16).view(-1, 2).unbind(1)
    number = ~x.isnan()
    assert torch.equal(low[number], bits(x.bfloat16())[number])
    assert torch.equal(high[number], bits((-x).bfloat16())[number])
    assert (low[~number] == 0x7FFF).all() and (~number).any()


def test_bfloat16_relu(module: Any) -> None:
    x = floats()
    low, high = mapped(module, "bfloat16_relu", x).view(torch.int16).view(-1, 2).unbind(1)
    number = ~x.isnan()
    assert torch.equal(low.view(torch.bfloat16)[number], x.relu().bfloat16()[number])
    assert torch.equal(high.view(torch.bfloat16)[number], (-x).relu().bfloat16()[number])
    assert (low[~number] == 0x7FFF).all() and (high[~number] == 0x7FFF).all()


def test_float16(module: Any) -> None:
    x = floats()
    d = mapped(module, "float16", x)
    number = ~x.isnan()
    assert torch.equal(d[number].short(), bits(x.half())[number])
    assert (d[~number] == 0x7FFF).all()


def test_halves_to_float(module: Any) -> None:
    every = torch.arange(-(2**15), 2**15).short()
    d = run(module, "from_halves", every, d=torch.empty(2**16, 2), number=2**16)
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        expected = every.view(dtype).float()
        assert torch.equal(d[:, column].isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(bits(d[number, column]), bits(expected[number]))


def test_tf32(module: Any) -> None:
    x = floats()
    x = x[x.isfinite() & (x.abs() > 1e-37) & (x.abs() < 1e38)]
    step = 2.0 ** (x.double().abs().log2().floor() - 10)
    step = torch.where(x.double().abs() >= 2048 * step, 2 * step, step)
    nearest = x.double().sign() * (x.double().abs() / step + 0.5).floor() * step
    result = mapped(module, "tf32", x).view(torch.float32)
    assert torch.equal(result.double(), nearest)
    assert mapped(module, "tf32", torch.tensor([torch.inf])).view(torch.float32) == torch.inf
    assert mapped(module, "tf32", torch.tensor([torch.nan])).view(torch.float32).isnan()


def test_approximations(module: Any) -> None:
    x = torch.linspace(-125, 127, 10_001)
    result = mapped(module, "exp2", x).view(torch.float32).double()
    assert ((result / x.double().exp2() - 1).abs() < 2.0**-22).all()
    tiny = mapped(module, "exp2", torch.tensor([-126.5, -torch.inf, 1e-40])).view(torch.float32)
    assert tiny.tolist() == [0.0, 0.0, 1.0]
    y = torch.logspace(-37, 38, 10_001)
    result = mapped(module, "log2", y).view(torch.float32).double()
    assert ((result - y.double().log2()).abs() <= 2.0**-22 * y.double().log2().abs() + 1e-9).all()
    special = mapped(module, "log2", torch.tensor([0.0, 1e-40, -1.0])).view(torch.float32)
    assert special[0] == special[1] == -torch.inf and special[2].isnan()


def test_shared_memory_begins_as_garbage(module: Any) -> None:
    patterns = set()
    for seed in SEEDS:
        module.twin_configure(seed=seed)
        d = run(module, "garbage", d=torch.zeros(256, dtype=torch.int8), number=256, shared=256)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert d.view(dtype).isnan().all()
        patterns.add(d.view(torch.int32)[0].item())
    assert len(patterns) > 1


def results(module: Any, name: str, expected: Tensor, **options: Any) -> set[bool]:
    """Whether the result is right, over the seeds."""
    found = set()
    for seed in SEEDS:
        module.twin_configure(seed=seed)
        d = torch.full_like(expected, -7)
        run(module, name, d=d, **options)
        found.add(torch.equal(d, expected))
    return found


@pytest.mark.parametrize(
    ("name", "threads", "rounds"),
    [("rotate", 128, 1), ("rotate_twice", 128, 2), ("rotate_warp", 32, 1)],
)
def test_barriers_are_needed_and_suffice(module: Any, name: str, threads: int, rounds: int) -> None:
    a = torch.randn(rounds, threads)
    options: dict[str, Any] = {"a": a, "threads": threads, "shared": 4 * threads}
    assert results(module, name, a.roll(-1, 1), **options) == {True}
    assert results(module, f"{name}_early", a.roll(-1, 1), **options) == {False}


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies(module: Any, size: int) -> None:
    a = torch.randint(1, 100, (32, size), dtype=torch.int8)
    for bytes in range(size + 1):
        expected = a.clone()
        expected[:, bytes:] = 0
        options: dict[str, Any] = {"a": a, "number": bytes, "shared": 32 * size}
        assert results(module, f"copy{size}", expected, **options) == {True}
    options["d"] = torch.empty_like(a)
    for bytes in (-1, size + 1):
        refused(module, f"copy{size}", f"of {bytes} bytes", **{**options, "number": bytes})
    refused(module, f"copy{size}", "are not in the block", **{**options, "shared": 31 * size})


def test_copies_want_aligned_addresses(module: Any) -> None:
    options: dict[str, Any] = {"a": torch.ones(32, 5), "d": torch.empty(32, 4), "number": 16}
    refused(module, "copy_skew_to", "is not a multiple of 16", **options, shared=1024)
    refused(module, "copy_skew_from", "an address that is not a multiple", **options, shared=512)
    refused(module, "copy_from_shared", "from shared memory", shared=512)


def test_copies_land_late_or_at_once(module: Any) -> None:
    a = torch.randn(32, 4, 4)
    first = a[:, :, 0].contiguous()
    options: dict[str, Any] = {"a": a, "shared": 32 * 64}
    assert results(module, "groups0", first, **options) == {True}
    early = {1: 0, 3: 0}
    for pending in early:
        for seed in SEEDS:
            module.twin_configure(seed=seed)
            d = run(module, f"groups{pending}", d=torch.full((32, 4), -7.0), **options)
            ready = 4 - pending
            assert torch.equal(d[:, :ready], first[:, :ready])
            there = d[:, ready:] == first[:, ready:]
            assert (there | d[:, ready:].isnan()).all()
            early[pending] += int(there.sum())
        share = early[pending] / (len(SEEDS) * 32 * pending)
        assert 0.4 < share < 0.6


@pytest.mark.parametrize("name", ["not_waited", "not_committed"])
def test_copies_must_be_waited_for(module: Any, name: str) -> None:
    words = ("returned without wait_copies for copy_async at tests/cuda/twin/selftest.cu:",)
    refused(module, name, *words, a=torch.ones(32, 4), shared=512, seeds=SEEDS)


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("return", 5, ["returned", "sync_threads at"]),
        ("return", 63, ["returned", "sync_threads at"]),
        ("return_from_warp", 5, ["returned", "sync_warp at"]),
        ("two_barriers", 32, ["others of the block at sync_threads at"]),
        ("two_barriers", 7, ["others of the block at sync_threads at"]),
        ("two_places", 7, ["others of the warp at sync_warp at"]),
        ("two_collectives", 40, ["sync_warp at", "any at"]),
        ("warp_and_block", 7, ["sync_warp at", "sync_threads at"]),
        ("warp_and_block", 33, ["sync_warp at", "sync_threads at"]),
        ("two_masks", 7, ["mask 1", "mask 2"]),
    ],
)
def test_threads_that_do_not_meet_are_refused(
    module: Any, name: str, number: int, words: list[str]
) -> None:
    d = torch.empty(64, dtype=torch.int32)
    seeds = range(4)
    if name == "two_masks":
        words = ["mask ", "others of the warp "]
    threads = 32 if name == "two_masks" else 64
    refused(module, name, *words, d=d, number=number, threads=threads, seeds=seeds)


def test_two_barriers_of_whole_blocks_are_fine(module: Any) -> None:
    for number in (0, 64):
        run(module, "two_barriers", number=number, threads=64)
    for number in (0, 32, 64):
        run(module, "two_places", number=number, threads=64)
        run(module, "warp_and_block", number=number, threads=64)


def test_an_error_names_both_places_and_all_threads(module: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        run(module, "two_barriers", number=32, threads=64)
    first = line_of("sync_threads()", "two_barriers_kernel")
    for line in (first, first + 2):
        assert f"selftest.cu:{line}" in str(caught.value)
    assert re.search(r"threads \d+ to \d+: sync_threads at", str(caught.value))


def test_goes_on_after_an_error(module: Any) -> None:
    a = torch.randn(1, 128)
    for _ in range(3):
        refused(module, "return", number=5, threads=64)
        options: dict[str, Any] = {"a": a, "threads": 128, "shared": 512}
        assert results(module, "rotate", a.roll(-1, 1), **options) == {True}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 1056}, "does not fit this device"),
        ({"threads": 48}, "does not fit this device"),
        ({"threads": 0}, "does not fit this device"),
        (
            {"shared": 100_001},
            "needs 100001 bytes of shared memory, a block of this device has 100000",
        ),
    ],
)
def test_limits_of_launches(module: Any, options: dict[str, int], words: str) -> None:
    module.twin_configure(shared_bytes=100_000)
    with pytest.raises(RuntimeError, match=words):
        run(module, "barriers", **options)
    assert module.twin_launches() == []
    run(module, "barriers", threads=1024, shared=100_000)


def test_dropped_calls(module: Any) -> None:
    a = torch.randn(1, 128)
    expected, options = a.roll(-1, 1), {"a": a, "threads": 128, "shared": 512}
    run(module, "rotate", d=torch.empty_like(a), **options)
    ((kind, file, line, count),) = module.twin_places()
    assert (kind, file, count) == ("barrier", "tests/cuda/twin/selftest.cu", 1)
    assert line == line_of("sync_threads()", "void rotate(")

    def dropped(*place: Any) -> Tensor:
        module.twin_configure()
        module.twin_drop(*place)
        return run(module, "rotate", d=torch.empty_like(a), **options)

    assert not torch.equal(dropped("barrier", "selftest.cu", line), expected)
    for place in (("barrier", "other.cu", line), ("barrier", file, line + 1), ("wait", file, line)):
        assert torch.equal(dropped(*place), expected)
    module.twin_configure()
    assert torch.equal(run(module, "rotate", d=torch.empty_like(a), **options), expected)
    with pytest.raises(RuntimeError, match=r"twin_drop: .*kind"):
        module.twin_drop("nothing", file, line)


def test_a_dropped_wait_is_an_error(module: Any) -> None:
    options: dict[str, Any] = {"a": torch.ones(32, 4), "d": torch.empty(32, 4), "shared": 512}
    line = line_of("wait_copies<0>", "void copy(")
    module.twin_drop("wait", "selftest.cu", line)
    with pytest.raises(RuntimeError, match="returned without wait_copies"):
        run(module, "copy16", number=16, **options)


@pytest.fixture(scope="module")
def watching() -> Any:
    """The module that errors where threads race."""
    return load(build.build("_selftest", asan=False, races=True))


@pytest.mark.parametrize("name", RACES)
def test_races_are_errors_in_every_order(watching: Any, name: str) -> None:
    after, *accesses = RACES[name]
    places = {f"selftest.cu:{line_of(text, after)}" for text in accesses}
    threads = {"rotate_early": 128, "rotate_twice_early": 128}.get(
        name, 32 if "rot" in name else 64
    )
    for seed in SEEDS:
        watching.twin_configure(seed=seed)
        with pytest.raises(RuntimeError, match=r"race at offset .* no barrier") as caught:
            run(watching, name, torch.ones(256), d=torch.empty(256), threads=threads, shared=1024)
        assert set(re.findall(r"selftest\.cu:\d+", str(caught.value).splitlines()[0])) >= places


@pytest.mark.parametrize(
    ("name", "threads"),
    [
        *(("rotate", 128), ("rotate_twice", 128), ("rotate_warp", 32), ("no_race", 64)),
        *(("groups0", 32), ("copy4", 32), ("order", 64), ("products", 32)),
    ],
)
def test_what_is_no_race_is_no_error(watching: Any, name: str, threads: int) -> None:
    for seed in SEEDS:
        watching.twin_configure(seed=seed)
        a, d = torch.ones(512), torch.zeros(512)
        run(watching, name, a, d=d, threads=threads, shared=2048, number=2)


ALONE = """
import ctypes, importlib.util, os, sys
os.environ.pop("LD_PRELOAD", None)  # not for the program that finds names for a report
spec = importlib.util.spec_from_file_location("_selftest", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
a, d = (libc.malloc(ctypes.c_size_t(128)) for _ in "ad")
ctypes.memset(a, 0, 128)
module.run(sys.argv[2], a=a, d=d, number=int(sys.argv[3]), shared=200, threads=32)
print("survived")
"""


def alone(asan: bool, name: str, number: int) -> subprocess.CompletedProcess[str]:
    """Run a kernel with buffers of 32 floats and 200 bytes of shared memory in another process."""
    module = build.build("_selftest", asan=asan)
    return subprocess.run(
        [sys.executable, "-c", ALONE, str(module), name, str(number)],
        env=build.environment(asan),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("name", "last"),
    [("read_global", 31), ("write_global", 31), ("read_shared", 49), ("write_shared", 49)],
)
def test_sanitizer_sees_one_element_too_far(name: str, last: int) -> None:
    assert "survived" in alone(True, name, last).stdout
    for number in (last + 1, -1):
        done = alone(True, name, number)
        assert done.returncode != 0 and "survived" not in done.stdout
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
        assert f"{name}_kernel" in done.stderr and "selftest.cu" in done.stderr


def test_sanitizer_sees_copies_too_far() -> None:
    # 32 threads with 8 bytes each are more than 128 bytes.
    assert "survived" in alone(True, "copy4", 4).stdout
    done = alone(True, "copy8", 8)
    assert "survived" not in done.stdout
    assert "copy_async" in done.stderr or "AddressSanitizer" in done.stderr


@pytest.mark.parametrize("name", ["read_double", "write_double"])
def test_sanitizer_sees_addresses_that_are_not_aligned(name: str) -> None:
    assert "survived" in alone(True, name, 2).stdout
    for number in (1, 3):
        done = alone(True, name, number)
        assert done.returncode != 0 and "survived" not in done.stdout
        assert "misaligned address" in done.stderr, done.stderr


@pytest.mark.parametrize("asan", [False, True])
def test_stack_overflow_is_caught(asan: bool) -> None:
    assert "survived" in alone(asan, "deep", 20).stdout
    done = alone(asan, "deep", 1000)
    assert done.returncode != 0 and "survived" not in done.stdout


def test_build_refuses_changes_that_do_not_fit() -> None:
    for old in ("no such text", "XATTN_DEVICE"):
        with pytest.raises(ValueError, match=r"device\.h: expected once, found"):
            build.build(changes={"cuda/device.h": (old, "")}, only=("table.cu",))
