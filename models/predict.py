"""Predictions for images of any size, from Python and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xattn_kernels import backend

from . import images, pictures
from .checkpoints import load_checkpoint, read_checkpoint
from .sca_mtl import SCAMTL, sca_mtl

ARRAYS = "arrays.npz"
SHEET = "sheet.png"
SETTINGS = "sca_mtl"
"""Key of a checkpoint's metadata: arguments of `sca_mtl`, as JSON."""


class Predictor:
    """A network and all that is between an image and its predictions.

    Args:
        model: takes (B, 3, H, W) with H and W divisible by 32 and returns a dict, of which the
            tensors (B, n, H, W) are predictions; such as `SCAMTL`. Is put into evaluation mode
            and, if device or dtype are given, converted: itself, not a copy.
        device: to compute on. Default: the model's.
        dtype: to compute in. Default: the model's.
        engine: of xattn_kernels, for its operators; "auto" or a name, see `xattn_kernels.backend`.
        compile: run the model by `torch.compile`, anew for every size of images.
        mean: subtracted from the channels of an image in [0, 1]; ImageNet's by default.
        std: that the channels are divided by.

    Raises:
        ValueError: for an unknown engine.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        compile: bool = False,
        mean: tuple[float, ...] = images.IMAGENET_MEAN,
        std: tuple[float, ...] = images.IMAGENET_STD,
    ) -> None:
        self._engine = backend(engine)
        self.model = model.eval().to(device=device, dtype=dtype)
        self._call: Any = torch.compile(self.model) if compile else self.model
        self.mean, self.std = mean, std

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """Predict.

        Sizes that are no multiples of 32 are padded by repeating the last row and column, and what
        is predicted there is cut off.

        Args:
            image: (3, H, W) or (B, 3, H, W), RGB in [0, 1], any floating-point dtype, any device.

        Returns:
            (n, H, W) or (B, n, H, W) by task, the model's outputs (logits; values for depth and
            normals), in float32 (float64 if the model is) on the model's device.

        Raises:
            TypeError: for an image of integers.
            ValueError: for other shapes.
            RuntimeError: if the engine asked for cannot run.
        """
        if not image.is_floating_point():
            raise TypeError(f"image: got {image.dtype}, expected a floating-point tensor in [0, 1]")
        if image.dim() not in (3, 4) or image.shape[-3] != 3:
            raise ValueError(
                f"image: got shape {tuple(image.shape)}, expected (3, H, W) or (B, 3, H, W)"
            )
        parameter = next(self.model.parameters())
        precise = torch.promote_types(torch.float32, parameter.dtype)
        x = images.normalise(image.to(parameter.device, precise), self.mean, self.std)
        x = images.pad_to_multiple(x).to(parameter.dtype)
        height, width = image.shape[-2:]
        with self._engine, torch.no_grad():
            outputs = self._call(x if image.dim() == 4 else x.unsqueeze(0))
        return {
            task: images.crop(y if image.dim() == 4 else y[0], (height, width)).to(precise)
            for task, y in outputs.items()
            if isinstance(y, Tensor)
        }


def predict_file(
    predictor: Predictor,
    path: Path,
    out: Path,
    *,
    write_pictures: bool = True,
    write_arrays: bool = True,
    title: str = "",
) -> Path:
    """Predict for an image file; write a picture per task, a contact sheet, and the arrays.

    Args:
        predictor: with the model.
        path: of the image.
        out: folder; the files go to its subfolder of the image's name, ``<task>.png``,
            ``sheet.png`` and ``arrays.npz`` (float32 (n, H, W) by task: the network's outputs).
        write_pictures: or only arrays.
        write_arrays: or only pictures.
        title: of the contact sheet.

    Returns:
        The subfolder.

    Raises:
        ImageError: if the image cannot be used.
        OSError: if a file cannot be written.
    """
    image = images.open_image(path)
    outputs = predictor(images.to_tensor(image))
    arrays = {task: y.float().cpu().numpy() for task, y in outputs.items()}
    folder = out / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    if write_arrays:
        save_arrays: Any = np.savez
        save_arrays(folder / ARRAYS, **arrays)
    if write_pictures:
        write(folder, image, arrays, title)
    return folder


def write(
    folder: Path, image: Image.Image, arrays: Mapping[str, pictures.Array], title: str
) -> None:
    """Write the pictures of predictions (n, H, W) by task and their contact sheet."""
    drawn = {task: pictures.draw(task, array) for task, array in arrays.items()}
    for task, picture in drawn.items():
        pictures.save(folder / f"{task}.png", picture)
    pictures.sheet(folder / SHEET, image, drawn, title=title)


def check_stems(paths: Sequence[Path]) -> None:
    """Refuse images whose predictions would overwrite each other.

    Raises:
        ValueError: naming two of them.
    """
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(path.stem, path)
        if other is not path:
            raise ValueError(
                f"{other} and {path} have the same name: their results would be written to one "
                "folder; predict them one after the other into different ones"
            )


def from_checkpoint(
    path: Path,
    *,
    tasks: Sequence[str] | None = None,
    num_outputs: Mapping[str, int] | None = None,
    **arguments: Any,
) -> SCAMTL:
    """The network of a checkpoint, with its parameters.

    Tasks and numbers of outputs are read from the checkpoint unless they are given: from the
    settings that `save_checkpoint` notes, else from the names and shapes of the parameters. The
    order of the tasks is part of the network; safetensors without settings do not tell it.

    Args:
        path: see `load_checkpoint`.
        tasks: names, in order.
        num_outputs: by task.
        arguments: more arguments of `sca_mtl`; they have precedence over the checkpoint's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a damaged file, and if tasks are needed.
        RuntimeError: if parameters are missing, unknown or of other shapes; names them.
    """
    found = settings(path)
    for name, value in (("tasks", tasks), ("num_outputs", num_outputs), *arguments.items()):
        if value is not None:
            found[name] = value
    if tasks is not None and num_outputs is None:
        # Those of the checkpoint, for any tasks named: what does not fit is told by the shapes.
        known = found.get("num_outputs", {})
        missing = [task for task in tasks if task not in known]
        if missing:
            raise ValueError(f"{path}: has no outputs of {missing}, but of {list(known)}")
        sources = found.get("auxiliary_tasks") or tasks
        found["num_outputs"] = {task: known[task] for task in sources if task in known}
    if "tasks" not in found:
        raise ValueError(
            f"{path}: has the tasks {', '.join(sorted(found['num_outputs']))}, but does not tell "
            "their order, which the network depends on: give tasks"
        )
    model = sca_mtl(**found)
    load_checkpoint(model, path)
    return model


def settings(path: Path) -> dict[str, Any]:
    """Arguments of `sca_mtl`, as far as a checkpoint tells them.

    Returns:
        At least "num_outputs". "tasks" if their order is known: from the settings in the metadata
        of safetensors, or as the order of the parameters in a pickle.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a damaged file, and for a checkpoint of something else.
    """
    state = read_checkpoint(path)
    ordered = True
    if _is_safetensors(path):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            noted = (file.metadata() or {}).get(SETTINGS)
        if noted is not None:
            return _noted(path, noted)
        ordered = False
    targets = _channels(state, "heads.", ".last_layer.3.weight")
    sources = _channels(state, "scale_0.decoders.", ".weight")
    if not targets or not targets.keys() <= sources.keys():
        raise ValueError(
            f"{path}: no checkpoint of SCA-MTL: it has no parameters "
            "heads.<task>.last_layer.3.weight and scale_0.decoders.<task>.weight"
        )
    found: dict[str, Any] = {"num_outputs": sources}
    if ordered:
        found["tasks"] = list(targets)
        if list(sources) != list(targets):
            found["auxiliary_tasks"] = list(sources)
    return found


def _noted(path: Path, text: str) -> dict[str, Any]:
    try:
        noted = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged settings in the metadata: {error}") from error
    if not isinstance(noted, dict) or not {"tasks", "num_outputs"} <= noted.keys():
        raise ValueError(f"{path}: settings in the metadata without tasks and num_outputs")
    return noted


def _is_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _channels(state: Mapping[str, Tensor], prefix: str, suffix: str) -> dict[str, int]:
    """Output channels of the convolutions called prefix + task + suffix, by task."""
    return {
        name[len(prefix) : -len(suffix)]: value.shape[0]
        for name, value in state.items()
        if name.startswith(prefix) and name.endswith(suffix) and value.dim() == 4
    }
