"""The network as a program without this package's Python: torch.export and ONNX."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xattn_kernels import backend

from .images import MULTIPLE

TOLERANCE = 1e-4
"""Largest difference of an ONNX file's outputs from torch's, relative to the largest output."""


class _Predictions(nn.Module):
    """The tensors of a model's result: those of the tasks, without deep supervision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {task: y for task, y in self.model(image).items() if isinstance(y, Tensor)}


def export(
    model: nn.Module,
    image_size: tuple[int, int],
    *,
    batch: int = 1,
    dynamic: bool = False,
    deep_supervision: bool = False,
    engine: str = "auto",
    strict: bool = False,
) -> torch.export.ExportedProgram:
    """Export a network for inference by `torch.export`.

    `torch.export.save` writes the program to a file. The process that runs it has to import
    ``xattn_kernels`` before `torch.export.load`, for its operators, unless `engine` is
    "reference"; it needs neither ``xattn_models`` nor timm::

        import torch, xattn_kernels
        with torch.no_grad():  # the program writes into views, as inference may
            outputs = torch.export.load("sca_mtl.pt2").module()(image)

    The engine is chosen here, for the model's device, and is part of the program.

    Args:
        model: such as `SCAMTL`, in evaluation mode.
        image_size: height and width, multiples of 32. They are part of the program.
        batch: images at a time.
        dynamic: have the program take any number of images.
        deep_supervision: have the program return it too, as the model does.
        engine: of xattn_kernels; "auto" or a name, see `xattn_kernels.backend`.
        strict: see `torch.export.export`.

    Returns:
        A program from an image (B, 3, H, W) in the model's dtype, normalised, to a dict of the
        model's outputs.

    Raises:
        ValueError: for a model in training mode, other sizes, or an unknown engine.
        RuntimeError: if the engine asked for cannot run.
    """
    if model.training:
        raise ValueError("model: got one in training mode, expected model.eval()")
    height, width = image_size
    if height < 1 or width < 1 or height % MULTIPLE or width % MULTIPLE:
        raise ValueError(f"image_size: got {image_size}, expected multiples of {MULTIPLE}")
    if batch < 1:
        raise ValueError(f"batch: got {batch}, expected at least 1")
    module = model if deep_supervision else _Predictions(model)
    shapes = None
    if dynamic:
        # An example of one image would be taken for a constant.
        batch = max(batch, 2)
        shapes = {"image": {0: torch.export.Dim.AUTO}}
    with backend(engine), torch.no_grad():
        return torch.export.export(
            module, (_example(model, batch, image_size),), dynamic_shapes=shapes, strict=strict
        )


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    image_size: tuple[int, int],
    *,
    batch: int = 1,
    dynamic: bool = False,
) -> float | None:
    """Export a network for inference as an ONNX file, and check it.

    The operators are those of the ``reference`` engine, plain PyTorch: nothing of this package is
    needed to run the file, and nothing of its speed is kept. The input is called ``image``, the
    outputs have the names of the tasks.

    Args:
        model: as in `export`.
        path: of the file to write.
        image_size: as in `export`.
        batch: as in `export`.
        dynamic: as in `export`.

    Returns:
        The largest difference of what onnxruntime computes from what the model does, for a random
        image, relative to the largest value of the task's output; None without onnxruntime.

    Raises:
        ModuleNotFoundError: without onnx and onnxscript; says how to install them.
        RuntimeError: if the difference is above 1e-4; the file is not written then.
        ValueError: as `export`.
    """
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"{name} is not installed: pip install onnx onnxscript onnxruntime", name=name
            )
    path = Path(path)
    # The exporter takes attention apart as this form of it, whose outputs have other strides.
    with sdpa_kernel(SDPBackend.MATH), backend("reference"), torch.no_grad():
        program = export(model, image_size, batch=batch, dynamic=dynamic, engine="reference")
        expected = _Predictions(model)(_example(model, batch, image_size))
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["image"],
            output_names=list(expected),
            verbose=False,
        )
    assert exported is not None
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        exported.save(temporary, external_data=False)
        error = _check(temporary, _example(model, batch, image_size), expected)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return error


def run_onnx(path: str | os.PathLike[str], image: Tensor) -> dict[str, Tensor]:
    """What onnxruntime computes with a file of `export_onnx`, on the CPU.

    Args:
        path: of the file.
        image: (B, 3, H, W), of the file's shape and dtype.

    Returns:
        (B, n, H, W) by task.
    """
    onnxruntime: Any = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    outputs: Sequence[Any] = session.run(None, {"image": image.cpu().numpy()})
    return {
        output.name: torch.from_numpy(np.asarray(y))
        for output, y in zip(session.get_outputs(), outputs, strict=True)
    }


def _check(path: Path, image: Tensor, expected: dict[str, Tensor]) -> float | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    found = run_onnx(path, image)
    largest = 0.0
    for task, y in expected.items():
        error = float((found[task] - y.cpu()).abs().max() / y.abs().max().cpu())
        if not error <= TOLERANCE:  # also for NaN
            raise RuntimeError(
                f"{task}: onnxruntime's output differs from torch's by {error:.1e} of its largest "
                f"value, expected at most {TOLERANCE:.0e}"
            )
        largest = max(largest, error)
    return largest


def _example(model: nn.Module, batch: int, image_size: tuple[int, int]) -> Tensor:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 3, *image_size, generator=generator)
    return image.to(parameter)
