"""Determinism, threads, memory and process state."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import CASES, single

from .harness import Core, flat, with_gradients

CASE = replace(
    next(case for case in CASES if case.name == "joint"),
    query_tokens=(900, 500, 20),
    source_tokens=(900, 500, 20),
)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def everything(core: Core, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Results and gradients of :data:`CASE`."""
    with xk.backend("cpu"):
        results, grads = with_gradients(
            lambda slots: core.library(slots, CASE), flat(CASE.tensors(dtype)), CASE, dtype
        )
    return results + [g for g in grads if g is not None]


def block(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 18, n, generator=generator).to(dtype) for n in (900, 500, 20)]
    weight = torch.randn(6, 5, 18, 18, generator=generator).to(dtype) / 4
    bias = torch.randn(6, 5, 18, generator=generator).to(dtype)
    with torch.no_grad(), xk.backend("cpu"):
        return xk.cross_attention_block(features, weight, bias, Schedule.cross_task(3))


def test_repeats_are_equal_to_the_bit(core: Core) -> None:
    first = everything(core)
    for _ in range(250):
        assert all(map(torch.equal, everything(core), first))


def test_repeats_of_the_block_are_equal_to_the_bit() -> None:
    first = block()
    for _ in range(250):
        assert all(map(torch.equal, block(), first))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_results(core: Core, dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append([*everything(core, dtype), *block(dtype)])
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_concurrent_python_threads(core: Core) -> None:
    expected = [*everything(core), *block()]
    wrong = []

    def work() -> None:
        for _ in range(10):
            if not all(map(torch.equal, [*everything(core), *block()], expected)):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["linear", "softmax", "block"])
def test_the_interpreter_runs_on_during_a_native_call(name: str) -> None:
    x = torch.randn(1, 64, 6_000 if name == "softmax" else 200_000)
    schedule = Schedule.from_edges([(0, 1, 0, 0)], num_queries=2)
    weight, bias = torch.randn(1, 5, 64, 64) / 8, torch.randn(1, 5, 64)
    calls: dict[str, Any] = {
        "linear": lambda: xk.linear_cross_attention(x, x, x),
        "softmax": lambda: xk.softmax_cross_attention(x, x, x),
        "block": lambda: xk.cross_attention_block([x, x], weight, bias, schedule),
    }
    span: list[float] = []

    def work() -> None:
        with torch.no_grad(), xk.backend("cpu"):
            start = time.perf_counter()
            calls[name]()
            span[:] = [start, time.perf_counter()]

    thread = threading.Thread(target=work)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(1e-4)
    during = sum(span[0] < tick < span[1] for tick in ticks)
    # A call that held the lock would let at most a tick or two through around it.
    assert during > 5, f"{during} ticks in {span[1] - span[0]:.3f} s"


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_memory_is_flat(core: Core) -> None:
    case = single("leak", 400, 400, channels=16)
    inputs = [x.requires_grad_() for x in flat(case.tensors(torch.float32))]

    def step() -> None:
        checkpoint(core.function, *inputs, use_reentrant=False).sum().backward()
        for x in inputs:
            x.grad = None

    with xk.backend("cpu"):
        for _ in range(100):
            step()
        gc.collect()
        before = resident()
        for _ in range(1000):
            step()
    gc.collect()
    # One leaked output a step would be 100 MB.
    assert resident() - before < 20e6


def test_out_of_memory(core: Core) -> None:
    x = torch.randn(1, 4, 8)
    with xk.backend("cpu"):
        expected = core.function(x, x, x)
        huge = torch.randn(1, 1, 1).expand(2**16, 4, 2**26)  # 2^44 elements in 4 bytes
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            core.function(huge, x.expand(2**16, 4, 8), x.expand(2**16, 4, 8))
        assert torch.equal(core.function(x, x, x), expected)


def test_wide_features(core: Core) -> None:
    # Far wider than what any tile was made for.
    case = single("wide", 5, 7, channels=1500, batch=1)
    inputs = [x / 30 for x in flat(case.tensors(torch.float32))]
    with xk.backend("reference"):
        expected = core.function(*inputs)
    with xk.backend("cpu"):
        torch.testing.assert_close(core.function(*inputs), expected)


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fork_after_use() -> None:
    run_python(
        """
import os, sys, torch, xattn_kernels as xk
x = torch.randn(1, 32, 5000)
both = xk.linear_cross_attention, xk.softmax_cross_attention
with xk.backend("cpu"):
    expected = [f(x[..., :900], x, x) for f in both]
    child = os.fork()
    if child == 0:
        again = [f(x[..., :900], x, x) for f in both]
        os._exit(0 if all(map(torch.equal, again, expected)) else 1)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )


def test_workers_of_a_data_loader() -> None:
    run_python(
        """
import torch, xattn_kernels as xk
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        x = torch.full((1, 8, 600), float(i))
        with xk.backend("cpu"): return xk.linear_cross_attention(x, x, x)
x = torch.randn(1, 8, 600)
with xk.backend("cpu"): xk.linear_cross_attention(x, x, x)
for i, y in enumerate(torch.utils.data.DataLoader(Data(), num_workers=2)):
    torch.testing.assert_close(y, torch.full_like(y, float(i)), rtol=1e-4, atol=1e-6)
"""
    )


def test_subnormals_stay(core: Core) -> None:
    tiny = torch.tensor([1e-40])
    everything(core)
    block()
    assert (tiny / 2).item() > 0
    # Threads of the pool too.
    assert bool(((tiny.expand(1_000_000).clone() / 2) > 0).all())
    # Nor are they flushed inside: keys of 1e-40 are summed as they are.
    x = torch.full((1, 1, 4), 1e-40)
    with xk.backend("cpu"):
        _, (s, _) = xk.linear_cross_attention(
            x, x, torch.ones(1, 1, 4), feature_map="identity", return_state=True
        )
    assert s.item() == pytest.approx(4e-40, rel=1e-4)


@pytest.mark.parametrize("home", ["/nonexistent", "/proc"])
def test_import_needs_nothing(home: str) -> None:
    """No GPU is touched, no engine is loaded, no home folder is written to."""
    out = run_python(
        """
import sys, torch
import xattn_kernels
assert not torch.cuda.is_initialized()
for module in sys.modules:
    if module.startswith("xattn_kernels.ops."):
        assert module.split(".")[-1] not in xattn_kernels.registry.ENGINES, module
assert "xattn_kernels._core" not in sys.modules
print((torch.tensor([1e-40]) / 2 > 0).item())
""",
        HOME=home,
        CUDA_VISIBLE_DEVICES="",
        PATH="/nonexistent",
        http_proxy="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    assert out.strip() == "True"


def test_import_is_light() -> None:
    """Of what it may need later, nothing is imported that takes seconds."""
    run_python(
        """
import sys, torch
before = set(sys.modules)
import xattn_kernels
slow = {"torch._dynamo", "torch._inductor", "torchvision", "timm", "matplotlib", "sympy"}
assert not slow & (set(sys.modules) - before)
"""
    )
