"""Which engine runs, and what is said when none can."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import xattn_kernels as xk
from xattn_kernels import registry
from xattn_kernels.engines import native
from xattn_kernels.problem import ENGINES, OPERATORS, Problem

X = torch.zeros(1, 4, 3)


@pytest.fixture(autouse=True)
def untouched_choice() -> Iterator[None]:
    """No cached explanation, and no default of another test, is seen by the next."""
    before = registry._default.name
    registry._explain.cache_clear()
    yield
    registry._default.name = before
    registry._explain.cache_clear()


@pytest.fixture
def half_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU engine without float64, as an engine on a GPU may be."""
    module = registry.engine_module("linear_cross_attention", "cpu")
    monkeypatch.setattr(
        module,
        "refusals",
        lambda problem: ["has no float64"] if problem.dtype is torch.float64 else [],
    )


def test_engines_and_operators() -> None:
    infos = xk.list_backends()
    assert [info.name for info in infos] == list(ENGINES)
    by_name = {info.name: info for info in infos}
    assert by_name["reference"].available
    assert by_name["cpu"].available, by_name["cpu"].reason
    assert all((info.reason is None) == info.available for info in infos)
    assert "the native module _cuda was not built" in str(by_name["cuda"].reason)
    assert "CUDA" in str(by_name["triton"].reason)
    for op in OPERATORS:
        for engine in ("cpu", "reference"):
            assert (
                registry.engine_module(op, engine).refusals(Problem(op, X.dtype, "cpu", 4, 4)) == []
            )


def test_auto_takes_the_first_that_can() -> None:
    assert xk.explain("linear_cross_attention", X).engine == "cpu"
    assert registry.select(Problem("linear_cross_attention", X.dtype, "cuda", 4, 4)) == "reference"


def test_choices_nest_and_end() -> None:
    assert registry.current_backend() == "auto"
    with xk.backend("reference") as outer:
        assert outer.name == "reference"
        with xk.backend("cpu"):
            assert registry.current_backend() == "cpu"
        assert registry.current_backend() == "reference"
        with pytest.raises(KeyError), outer:
            raise KeyError
        assert registry.current_backend() == "reference"
    assert registry.current_backend() == "auto"


def test_choice_as_a_decorator() -> None:
    @xk.backend("reference")
    def chosen(depth: int) -> str:
        return chosen(depth - 1) if depth else registry.current_backend()

    assert chosen(2) == "reference"
    assert registry.current_backend() == "auto"


def test_default_of_the_process_and_choice_of_a_thread() -> None:
    xk.set_backend("reference")
    seen = []
    with xk.backend("cpu"):
        thread = threading.Thread(target=lambda: seen.append(registry.current_backend()))
        thread.start()
        thread.join()
        assert registry.current_backend() == "cpu"
    assert seen == ["reference"]
    assert registry.current_backend() == "reference"


@pytest.mark.parametrize("name", ["gpu", "", "CPU", None, 3])
def test_unknown_names(name: object) -> None:
    for function in (xk.backend, xk.set_backend):
        with pytest.raises(ValueError, match=r"backend: got .*'auto', 'cuda'") as error:
            function(name)  # type: ignore[arg-type]
        assert all(f"  {engine}: " in str(error.value) for engine in ENGINES)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


CALL = """
import torch, xattn_kernels as xk
x = torch.zeros(1, 4, 3)
xk.linear_cross_attention(x, x, x)
print(xk.explain("linear_cross_attention", x).engine)
"""


@pytest.mark.parametrize(("value", "engine"), [("reference", "reference"), ("", "cpu")])
def test_environment(value: str, engine: str) -> None:
    done = run_python(CALL, XATTN_BACKEND=value)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == engine


def test_environment_with_an_unknown_name() -> None:
    done = run_python(CALL, XATTN_BACKEND="fastest")
    assert done.returncode != 0
    assert "ValueError: XATTN_BACKEND: got 'fastest', expected one of 'auto'" in done.stderr


def test_engine_without_float64(half_cpu: None) -> None:
    x = X.double()
    with xk.backend("cpu"), pytest.raises(RuntimeError) as error:
        xk.linear_cross_attention(x, x, x)
    lines = str(error.value).splitlines()
    assert lines[0] == "backend 'cpu' cannot run this problem"
    assert "  cpu: has no float64" in lines
    assert "  reference: could run, was not asked for" in lines
    assert f"  cuda: {registry.unavailable('cuda')}" in lines
    explanation = xk.explain("linear_cross_attention", x)
    assert explanation.engine == "reference"
    assert explanation.reasons["cpu"] == ("has no float64",)
    assert "cpu: has no float64" in str(explanation)
    assert "reference: runs" in str(explanation)
    assert xk.linear_cross_attention(x, x, x).dtype is torch.float64


def test_engine_that_is_not_built() -> None:
    with xk.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot run") as error:
        xk.softmax_cross_attention(X, X, X)
    assert all(f"  {engine}: " in str(error.value) for engine in ENGINES)


def test_explanations() -> None:
    text = str(xk.explain("softmax_cross_attention", [X], X, [torch.zeros(1, 8, 3)], heads=2))
    assert "C=4, Cv=8, heads=2" in text
    assert "cpu: runs" in text
    assert "reference: could run, comes later" in text
    problem = Problem("cross_attention_block", torch.bfloat16, "cpu", 4, 4, transformed=True)
    assert "torch.func" in xk.explain(problem).reasons["cpu"][0]
    with pytest.raises(ValueError, match="op: got 'attention'"):
        xk.explain("attention", X)
    with pytest.raises(ValueError, match="query: got None"):
        xk.explain("linear_cross_attention")


# A native module that cannot be loaded. Fresh interpreters: loading is tried once.

MISSING = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "xattn_kernels._core":
            raise {error}
sys.meta_path.insert(0, Hide())
import torch, xattn_kernels as xk
x = torch.randn(1, 4, 3)
assert xk.linear_cross_attention(x, x, x).shape == x.shape  # the reference
assert xk.explain("linear_cross_attention", x).engine == "reference"
try:
    with xk.backend("cpu"):
        xk.linear_cross_attention(x, x, x)
except RuntimeError as error:
    print(error)
print("----")
import xattn_kernels.__main__ as command
command.main(["info"])
"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ('ModuleNotFoundError("hidden", name=name)', "pip install"),
        ('ImportError("undefined symbol: _ZN5xattn")', "undefined symbol: _ZN5xattn"),
    ],
)
def test_native_module_that_does_not_load(error: str, reason: str) -> None:
    done = run_python(MISSING.format(error=error))
    assert done.returncode == 0, done.stderr
    refusal, _, info = done.stdout.partition("----")
    assert "backend 'cpu' cannot run this problem" in refusal
    assert reason in refusal
    assert "no: the native module" in info
    assert reason in info


def test_native_module_of_another_version() -> None:
    done = run_python(
        """
from xattn_kernels import build_record
build_record.read = lambda: {"version": "0.0.9"}
import xattn_kernels as xk
print(next(e.reason for e in xk.list_backends() if e.name == "cpu"))
"""
    )
    assert done.returncode == 0, done.stderr
    assert "built for version 0.0.9" in done.stdout


def test_native_module_of_another_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    package = tmp_path / "xattn_kernels"
    (package / "ops").mkdir(parents=True)
    for name in ("_core.cpython-27-x86_64-linux-gnu.so", "_core.pyi", "_cuda.abi3.so"):
        (package / name).touch()
    monkeypatch.setattr(native, "__file__", str(package / "ops" / "native.py"))
    assert native._built_for_other_pythons() == ["_core.cpython-27-x86_64-linux-gnu.so"]
