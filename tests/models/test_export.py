"""The network as an exported program, and as ONNX."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from xattn_kernels import backend
from xattn_models import SCAMTL, sca_mtl
from xattn_models.__main__ import main
from xattn_models.export import export, export_onnx, run_onnx

SIZE = (64, 96)
TASKS = ("semseg", "depth")

RUN = """
import sys, torch, xattn_kernels
image, expected = torch.load(sys.argv[2])
with torch.no_grad():
    found = torch.export.load(sys.argv[1]).module()(image)
assert "xattn_models" not in sys.modules and "timm" not in sys.modules
for task, y in expected.items():
    assert (found[task] - y).abs().max() <= 1e-6 * y.abs().max(), task
"""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> SCAMTL:
    torch.manual_seed(0)
    return sca_mtl(TASKS, {"semseg": 5, "depth": 1}, "test_efficientnet").eval()


def compare(actual: object, expected: object, tolerance: float) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor) and actual.shape == expected.shape
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
        return
    assert isinstance(actual, dict) and isinstance(expected, dict)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        compare(actual[name], value, tolerance)


def evaluate(model: SCAMTL, image: torch.Tensor, engine: str) -> dict[str, object]:
    with backend(engine):
        return dict(model(image))


def test_reference_equals_eager(model: SCAMTL) -> None:
    program = export(model, SIZE, deep_supervision=True, engine="reference")
    image = torch.randn(1, 3, *SIZE)
    compare(program.module()(image), evaluate(model, image, "reference"), 3e-6)


def test_program_runs_elsewhere(model: SCAMTL, tmp_path: Path) -> None:
    program = export(model, SIZE, engine="cpu")
    image = torch.randn(1, 3, *SIZE)
    expected = {
        task: y for task, y in evaluate(model, image, "cpu").items() if isinstance(y, torch.Tensor)
    }
    compare(program.module()(image), expected, 3e-6)
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save((image, program.module()(image)), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path / "net.pt2", tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_any_batch(model: SCAMTL) -> None:
    program = export(model, SIZE, dynamic=True, engine="cpu")
    for batch in (1, 2, 5):
        image = torch.randn(batch, 3, *SIZE)
        found = program.module()(image)
        expected = evaluate(model, image, "cpu")
        for task in TASKS:
            compare(found[task], expected[task], 3e-6)


def test_onnx(model: SCAMTL, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    error = export_onnx(model, path, SIZE)
    assert error is not None and error <= 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    image = torch.randn(1, 3, *SIZE)
    found = run_onnx(path, image)
    assert list(found) == list(TASKS)
    expected = evaluate(model, image, "auto")
    for task in TASKS:
        compare(found[task], expected[task], 1e-4)


def test_arguments_are_checked(model: SCAMTL) -> None:
    with pytest.raises(ValueError, match="image_size: got"):
        export(model, (64, 90))
    with pytest.raises(ValueError, match="batch: got 0"):
        export(model, SIZE, batch=0)
    with pytest.raises(ValueError, match="'fpga'"):
        export(model, SIZE, engine="fpga")
    training = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="training mode"):
        export(training, SIZE)


def test_command_refuses_kernels_in_onnx(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--random-weights", "--format", "onnx", "--engine", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "net.onnx")]) == 2
    assert "--engine: got 'cpu', expected 'reference'" in capsys.readouterr().err
