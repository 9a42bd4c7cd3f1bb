"""torch.compile with inductor at several sizes, each in a process of its own.

Inductor keeps what it compiled for the next run in its own folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import copy, sys
import torch
from tests.modules.subjects import draw, error, make

name, mode, dynamic = sys.argv[1:]
module, maps = make(name)
module.train(mode == "train")
peer = copy.deepcopy(module)
compiled = torch.compile(module, dynamic={"auto": None, "dynamic": True}[dynamic])
for factor in (1, 2, 3) if mode != "train" else (1, 2):
    x = draw(maps, factor=factor)
    contexts = {"train": torch.enable_grad, "eval": torch.no_grad}
    with contexts.get(mode, torch.inference_mode)():
        found, expected = compiled(*x), peer(*x)
    assert error(found, expected) <= 2e-5, (factor, error(found, expected))
    if mode == "train":
        for one, outputs in ((module, found), (peer, expected)):
            one.zero_grad()
            sum(y.square().mean() for y in outputs).backward()
        pairs = zip(module.parameters(), peer.parameters(), strict=True)
        found, expected = zip(
            *((p.grad, q.grad) for p, q in pairs if q.grad is not None), strict=True
        )
        largest = max(g.abs().max() for g in expected)
        worst = max((a - b).abs().max() for a, b in zip(found, expected, strict=True))
        worst /= largest
        assert worst <= 2e-4, (factor, worst)
    statistics = zip(module.buffers(), peer.buffers(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in statistics)
from torch._dynamo.utils import counters
compilations = counters["stats"]["unique_graphs"]
assert compilations <= 3, f"{compilations} graphs for three sizes"
print("equal")
"""

CELLS = [
    ("cross-task", "eval", "auto"),
    ("cross-task", "inference", "dynamic"),
    ("head", "eval", "auto"),
    ("attention", "train", "auto"),
    ("block", "eval", "auto"),
    ("self-attention", "eval", "auto"),
    ("self-attention", "train", "auto"),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "mode", "dynamic"), CELLS)
def test_equal_to_eager(name: str, mode: str, dynamic: str) -> None:
    run(PROGRAM, name, mode, dynamic)


@pytest.mark.timeout(600)
def test_the_network() -> None:
    """Compiles as a whole, at one size; `python -m benchmarks.compiled` takes more."""
    run("""
import torch
from tests.modules.subjects import draw, error, make

module, maps = make("network")
x = draw(maps)
with torch.no_grad():
    found = torch.compile(module, fullgraph=True)(*x)
    assert error(found, module(*x)) <= 2e-5
print("equal")
""")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["cross-task", "attention-softmax", "head", "converted"])
def test_ahead_of_time(name: str, tmp_path: Path) -> None:
    """AOTInductor: exported, compiled, packaged, loaded in a process with the operators."""
    program = """
import sys
import torch
from tests.modules.subjects import draw, error, make

name, path = sys.argv[1:]
module, maps = make(name)
with torch.no_grad():
    exported = torch.export.export(module, draw(maps))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=path)
    compiled = torch._inductor.aoti_load_package(package)
    for seed in (1, 2):
        x = draw(maps, seed=seed)
        assert error(compiled(*x), module(*x)) <= 2e-5
print("equal")
"""
    run(program, name, str(tmp_path / "compiled.pt2"))


def run(program: str, *arguments: str) -> None:
    """In a process of its own; a program prints "equal" in the end."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().endswith("equal"), done.stdout + done.stderr[-3000:]
