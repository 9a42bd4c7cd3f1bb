"""Predictions for images of any size, from Python and as files."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from xattn_kernels import backend

from . import images, pictures
from .arguments import plain_names, plain_outputs
from .checkpoints import check_names_and_shapes, load_state
from .files import clip, listing, shown
from .memory import pixel_limit
from .sca_mtl import SCAMTL, sca_mtl
from .settings import check_given, read_settings

ARRAYS = "arrays.npz"
SHEET = "sheet.png"


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
        max_pixels: height times width of the largest image that is taken. Default: about what 8 GiB
            of memory are enough for, see `xattn_models.memory.pixel_limit`.

    Raises:
        ValueError: for an unknown engine, or a number of pixels below 1.
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
        max_pixels: int | None = None,
    ) -> None:
        self._engine = backend(engine)
        self.model = model.eval().to(device=device, dtype=dtype)
        self._call: Any = torch.compile(self.model) if compile else self.model
        self.mean, self.std = mean, std
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        self.limit = pixel_limit(
            self.model,
            reference=not on_cpu or engine not in ("auto", "cpu"),
            max_pixels=max_pixels,
        )

    def __call__(
        self, image: Tensor | Image.Image | npt.NDArray[Any] | str | os.PathLike[str]
    ) -> dict[str, Tensor]:
        """Predict.

        Sizes that are no multiples of 32 are padded by repeating the last row and column, and what
        is predicted there is cut off.

        Args:
            image: a tensor (3, H, W) or (B, 3, H, W), RGB in [0, 1], any floating-point dtype, any
                device; or an array (H, W, 3), RGB, uint8 or floating-point in [0, 1]; or a PIL
                image, or the path of a file, both read as `images.open_image` does.

        Returns:
            (n, H, W) or (B, n, H, W) by task, the model's outputs (logits; values for depth and
            normals), in float32 (float64 if the model is) on the model's device.

        Raises:
            TypeError: for anything else, such as a tensor of integers.
            ValueError: for other shapes and too many pixels, and for values of tensors and arrays
                that are far outside [0, 1] or not finite.
            ImageError: for a file or a PIL image that cannot be used or has too many pixels.
            RuntimeError: if the engine asked for cannot run.
        """
        x = self._tensor(image)
        parameter = next(self.model.parameters())
        precise = torch.promote_types(torch.float32, parameter.dtype)
        height, width = x.shape[-2:]
        single = x.dim() == 3
        x = images.normalise(x.to(parameter.device, precise), self.mean, self.std)
        x = images.pad_to_multiple(x).to(parameter.dtype)
        with self._engine, torch.no_grad():
            outputs = self._call(x.unsqueeze(0) if single else x)
        return {
            task: images.crop(y[0] if single else y, (height, width)).to(precise)
            for task, y in outputs.items()
            if isinstance(y, Tensor)
        }

    def _tensor(self, image: object) -> Tensor:
        if isinstance(image, (str, os.PathLike)):
            return images.to_tensor(images.open_image(Path(image), self.limit))
        if isinstance(image, Image.Image):
            return images.to_tensor(images.to_rgb(image, self.limit))
        if isinstance(image, np.ndarray):
            if image.ndim == 3:
                self._check_size(image.shape[0], image.shape[1])
            image = images.from_array(image)
        if not isinstance(image, Tensor):
            raise TypeError(
                f"image: got {clip(type(image).__name__, 100)}, expected a tensor (3, H, W) or "
                "(B, 3, H, W), an array (H, W, 3), a PIL image or the path of an image file"
            )
        if not image.is_floating_point():
            raise TypeError(f"image: got {image.dtype}, expected a floating-point tensor in [0, 1]")
        if image.dim() not in (3, 4) or image.shape[-3] != 3:
            raise ValueError(
                f"image: got shape {tuple(image.shape)}, expected (3, H, W) or (B, 3, H, W)"
            )
        self._check_size(image.shape[-2], image.shape[-1])
        # Resampling goes a little beyond 0 and 1; values up to 255 go far.
        if not bool(((image > -1) & (image < 2)).all()):
            low, high = image.min().item(), image.max().item()
            raise ValueError(f"image: got values from {low:.4g} to {high:.4g}, expected [0, 1]")
        return image

    def _check_size(self, height: int, width: int) -> None:
        refusal = self.limit.refusal(height * width, f"{height} x {width} = ")
        if refusal:
            raise ValueError(f"image: {refusal}")


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

    The files are written to a temporary folder in `out` and renamed when all are complete. After an
    error or an interruption, those from before are still there.

    Args:
        predictor: with the model, and the largest size of images.
        path: of the image.
        out: folder; the files go to its subfolder of the image's name, ``<task>.png``,
            ``sheet.png`` and ``arrays.npz`` (float32 (n, H, W) by task: the network's outputs).
        write_pictures: or only arrays.
        write_arrays: or only pictures.
        title: of the contact sheet.

    Returns:
        The subfolder.

    Raises:
        ImageError: if the image cannot be used or has too many pixels.
        ValueError: if the model has a task that no file can be named after.
        OSError: if a file cannot be written.
    """
    image = images.open_image(path, predictor.limit)
    outputs = predictor(images.to_tensor(image))
    for task in outputs:
        if Path(task).name != task or f"{task}.png" == SHEET:
            raise ValueError(f"task {clip(task, 100)!r}: expected a name for a file of its own")
    arrays = {task: y.float().cpu().numpy() for task, y in outputs.items()}
    folder = out / folder_name(path)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=out) as name:
        complete = Path(name)
        if write_arrays:
            _save_arrays(complete / ARRAYS, arrays)
        if write_pictures:
            write(complete, image, arrays, title)
        folder.mkdir(exist_ok=True)
        for file in complete.iterdir():
            os.replace(file, folder / file.name)
    return folder


def write(
    folder: Path, image: Image.Image, arrays: Mapping[str, pictures.Array], title: str
) -> None:
    """Write the pictures of predictions (n, H, W) by task and their contact sheet."""
    drawn = {task: pictures.draw(task, array) for task, array in arrays.items()}
    for task, picture in drawn.items():
        pictures.save(folder / f"{task}.png", picture)
    pictures.sheet(folder / SHEET, image, drawn, title=title)


def folder_name(path: Path) -> str:
    """Name of the folder for an image: the file's without its suffix."""
    return path.stem if path.stem.strip(".") else path.name


def check_stems(paths: Sequence[Path]) -> None:
    """Refuse images whose predictions would overwrite each other.

    Raises:
        ValueError: naming two of them.
    """
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(folder_name(path), path)
        if other is not path:
            raise ValueError(
                f"{shown(other)} and {shown(path)} have the same name: their results would be "
                "written to one folder; predict them one after the other into different ones"
            )


def from_checkpoint(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    tasks: Sequence[str] | None = None,
    num_outputs: Mapping[str, int] | None = None,
    **arguments: Any,
) -> SCAMTL:
    """The network of a checkpoint, with its parameters.

    What the checkpoint tells of the network is taken from there: from the settings that
    `save_checkpoint` notes, else from the names and shapes of the parameters. Anything else has to
    be given, or has the defaults of `sca_mtl`. The order of the tasks is part of the network;
    safetensors without settings do not tell it. Settings are data from a fixed list: they name no
    files and no pretraining, and no memory is allocated for a network that the parameters do not
    fit.

    Args:
        path: see `load_checkpoint`.
        key: of the parameters in the file, see `read_checkpoint`.
        tasks: names, in order.
        num_outputs: by task.
        arguments: more arguments of `sca_mtl`. ``recompute`` and ``pretrained`` are free; others
            must be those of the file where it tells them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a damaged file; for settings that are not on the list, naming the field; if
            tasks or other arguments are needed; for arguments that contradict the file, naming
            both values.
        RuntimeError: if parameters are missing, unknown or of other shapes; names them.
    """
    told = read_settings(path, key)
    given: dict[str, Any] = {"tasks": tasks, "num_outputs": num_outputs, **arguments}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("tasks", "auxiliary_tasks"):
        if name in given:
            given[name] = plain_names(name, given[name])
    if num_outputs is not None:
        given["num_outputs"] = plain_outputs("num_outputs", num_outputs)
    check_given(path, told, given)
    merged = {**told.arguments, **given}
    if "tasks" not in merged:
        raise ValueError(
            f"{shown(path)}: has the tasks {listing(sorted(told.targets), 12)}, but does not tell "
            "their order, which the network depends on: give tasks"
        )
    if told.sources.keys() != told.targets and not merged.get("auxiliary_tasks"):
        raise ValueError(
            f"{shown(path)}: has the auxiliary tasks {listing(sorted(told.sources), 12)}, but does "
            "not tell their order, which the network depends on: give auxiliary_tasks"
        )
    if told.left_out and "backbone_arguments" not in given:
        raise ValueError(
            f"{shown(path)}: was saved from a backbone with arguments that the file does not hold, "
            f"{listing(told.left_out)}: give backbone_arguments"
        )
    try:
        with torch.device("meta"):
            planned = sca_mtl(**{**merged, "pretrained": False})
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {clip(error, 1500)}") from None
    try:
        check_names_and_shapes(planned, told.state, path)
    except RuntimeError as error:
        if "backbone" in merged:
            raise
        raise RuntimeError(f"{error}\nThe file does not tell its backbone: give backbone") from None
    model = sca_mtl(**merged)
    load_state(model, told.state, path)
    return model


def _save_arrays(path: Path, arrays: Mapping[str, pictures.Array]) -> None:
    """As `numpy.savez`, which takes some names for arguments of its own."""
    with zipfile.ZipFile(path, "w") as archive:
        for task, array in arrays.items():
            with archive.open(f"{task}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
