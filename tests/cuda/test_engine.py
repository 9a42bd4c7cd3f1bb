"""Loading of the CUDA engine, with stand-ins for ``xattn_kernels._cuda``: no GPU, no kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import xattn_kernels as xk
from xattn_kernels import build_record, registry
from xattn_kernels.engines import native_cuda
from xattn_kernels.problem import Problem

NAME = "xattn_kernels._cuda"
X = torch.zeros(1, 4, 3)
PROBLEM = Problem("linear_cross_attention", torch.float32, "cpu", 4, 4)


def forget() -> None:
    """Ask again which engines there are."""
    for cached in (native_cuda._load, registry.unavailable, registry._explain):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    forget()
    yield
    forget()


Install = Callable[..., ModuleType]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a module with these attributes where the engine looks for its own."""

    def make(**attributes: Any) -> ModuleType:
        module = ModuleType(NAME)
        for name, value in attributes.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, NAME, module)
        forget()
        return module

    return make


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Has torch say that there is one of a compute capability."""

    def make(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))

    return make


def fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Has the module's import raise an error."""

    def find(name: str, *_: Any) -> None:
        if name == NAME:
            raise error

    finder = type("Finder", (), {"find_spec": staticmethod(find)})
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "install again on a machine with nvcc"),
        ({"version": xk.__version__}, "install again on a machine with nvcc"),
        (
            {"version": xk.__version__, "cuda": {"reason": "nvcc was not found"}},
            "nvcc was not found",
        ),
    ],
    ids=["nothing", "unsaid", "said"],
)
def test_module_that_was_not_built(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, Any] | None, reason: str
) -> None:
    fails(monkeypatch, ModuleNotFoundError(f"No module named {NAME!r}"))
    monkeypatch.setattr(build_record, "read", lambda: record)
    expected = f"the native module _cuda was not built: {reason}"
    assert native_cuda.load_error() == expected
    with pytest.raises(RuntimeError, match=expected):
        native_cuda.module()


def test_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, ImportError("undefined symbol: cudaLaunchKernel"))
    error = "the native module _cuda does not load: undefined symbol: cudaLaunchKernel"
    assert native_cuda.load_error() == error


def test_module_of_another_version(install: Install) -> None:
    install(__version__="0.0.1", device_type="cuda")
    error = native_cuda.load_error()
    assert error is not None
    assert error.startswith("the native module _cuda was built for version 0.0.1, this is ")
    assert xk.__version__ in error and error.endswith("install again")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_machine_without_a_gpu(install: Install) -> None:
    install(__version__=xk.__version__, device_type="cuda")
    assert native_cuda.load_error() == "no CUDA device"


def test_reasons_are_what_a_call_by_name_says(install: Install) -> None:
    install(__version__="0.0.1", device_type="cuda")
    reason = {engine.name: engine.reason for engine in xk.list_backends()}["cuda"]
    assert reason == native_cuda.load_error()
    with xk.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot run") as error:
        xk.linear_cross_attention(X, X, X)
    assert f"cuda: {reason}" in str(error.value)
    assert "cpu: could run, was not asked for" in str(error.value)
    assert xk.explain("linear_cross_attention", X).engine == "cpu"


def test_what_a_loaded_module_refuses(install: Install, gpu: Callable[[int, int], None]) -> None:
    archs = ["80-real", "90a-real"]
    module = install(__version__=xk.__version__, device_type="cuda", compiled_archs=lambda: archs)
    gpu(8, 0)
    assert native_cuda.load_error() is None
    assert native_cuda.module() is module
    on_gpu = PROBLEM._replace(device="cuda")
    assert native_cuda.refusals(on_gpu) == []
    refused = {
        "runs on CUDA tensors, not on cpu": PROBLEM,
        "has no float64 kernels": on_gpu._replace(dtype=torch.float64),
        "takes up to 384 channels, not 385": on_gpu._replace(channels=385),
        "takes up to 384 channels, not 400": on_gpu._replace(value_channels=400),
        "takes up to 384 channels a head, not 386": on_gpu._replace(channels=772, heads=2),
        "kernels have no rules for torch.func transforms and forward-mode gradients": (
            on_gpu._replace(transformed=True)
        ),
    }
    for reason, problem in refused.items():
        assert native_cuda.refusals(problem) == [reason]
    assert native_cuda.refusals(on_gpu._replace(channels=384, value_channels=384)) == []
    assert native_cuda.refusals(on_gpu._replace(channels=768, value_channels=768, heads=2)) == []
    several = on_gpu._replace(dtype=torch.float64, channels=385)
    assert len(native_cuda.refusals(several)) == 2
    gpu(7, 5)
    assert native_cuda.refusals(on_gpu) == ["needs compute capability 8.0, not 7.5"]
    gpu(12, 0)
    assert native_cuda.refusals(on_gpu) == [
        "was built for 80-real, 90a-real, not for compute capability 12.0: "
        "install again on this machine, or with XATTN_CUDA_ARCHS"
    ]


def test_module_for_tensors_of_the_cpu(install: Install) -> None:
    """As tests have it: no GPU is asked for."""
    install(__version__=xk.__version__, device_type="cpu")
    assert native_cuda.load_error() is None
    assert native_cuda.refusals(PROBLEM) == []
    on_gpu = PROBLEM._replace(device="cuda")
    assert native_cuda.refusals(on_gpu) == ["runs on CPU tensors, not on cuda"]


def test_memory_of_a_call() -> None:
    device, stream, _, scratch = native_cuda.context(X)
    assert (device, stream) == (0, 0)
    assert isinstance(scratch, native_cuda.Scratch) and scratch.memory is None
    address = scratch(1000)
    assert scratch.memory is not None
    assert (scratch.memory.data_ptr(), scratch.memory.nbytes) == (address, 1000)
    assert scratch.memory.device == X.device


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision_of_a_call(precision: str) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = precision
        assert native_cuda.context(X)[2] == (precision == "tf32")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
