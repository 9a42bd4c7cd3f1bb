"""Checkpoints: safetensors, and pickles that hold tensors alone."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training programs keep the parameters in a checkpoint."""
PREFIX = "module."
"""What data-parallel wrappers put before every name."""


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], strict: bool = True
) -> tuple[list[str], list[str]]:
    """Load parameters and buffers into a model.

    Args:
        model: gets the values, in its own dtypes and on its devices.
        path: safetensors, or a file of `torch.save`: a `state_dict`, or a dict that has one under
            one of `WRAPPERS`. Names may begin with "module.". Pickles are read with
            ``weights_only=True``: no code in them is run.
        strict: refuse missing and unknown names, as `torch.nn.Module.load_state_dict`.

    Returns:
        Missing and unexpected names, empty if `strict`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is truncated, corrupt or holds something else.
        RuntimeError: of torch, for names and shapes that do not fit; names them.
    """
    state = read_checkpoint(path)
    try:
        missing, unexpected = model.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        raise RuntimeError(f"{os.fspath(path)}: {error}") from None
    return missing, unexpected


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The names and tensors of a checkpoint, see `load_checkpoint`, on the CPU."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = _read_pickle(path) if _is_pickle(path) else _read_safetensors(path)
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        kind = "nothing" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: got {kind}, expected names and tensors")
    wrong = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if wrong or not all(isinstance(name, str) for name in content):
        raise ValueError(
            f"{path}: expected names and tensors, or those under one of {WRAPPERS}; "
            f"{wrong[:5]} are no tensors"
        )
    if all(name.startswith(PREFIX) for name in content):
        return {name.removeprefix(PREFIX): value for name, value in content.items()}
    return dict(content)


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model's parameters and buffers as safetensors, with the arguments of `sca_mtl`.

    The file appears under its name complete or not at all: it is written beside it and renamed,
    so that a checkpoint from before survives an interruption.

    Args:
        model: what to save.
        path: of the file.

    Raises:
        OSError: if the file cannot be written.
    """
    from safetensors.torch import save

    path = Path(path)
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
    }
    metadata = {"format": "pt"}
    settings = getattr(model, "settings", None)
    if isinstance(settings, dict):
        metadata["sca_mtl"] = json.dumps(settings)
    data = save(state, metadata=metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_pickle(path: Path) -> bool:
    """Whether the file begins as those of `torch.save` do, in the zip or in the old format.

    The first eight bytes of safetensors are the length of a header, which follows as JSON.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return (start[:2] == b"PK" or start[:1] == b"\x80") and start[8:] != b"{"


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: not read, for it is no pickle of tensors alone: {error}"
        ) from error
    except Exception as error:  # damaged bytes lead to any kind
        raise ValueError(f"{path}: truncated or corrupt checkpoint: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: neither safetensors nor a file of torch.save, truncated or corrupt: {error}"
        ) from error
