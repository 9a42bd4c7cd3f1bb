"""Checkpoints: safetensors, and pickles of which nothing but plain data is read."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from . import metadata
from .files import clip, listing, replacing, shown
from .sca_mtl import SCAMTL
from .unpickling import read_pickle

WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "module")
"""Keys under which training programs keep the parameters in a checkpoint."""
AVERAGES = ("model_ema", "ema", "ema_state_dict", "state_dict_ema")
"""Keys of their moving averages, taken only if there are no parameters under `WRAPPERS`."""
PREFIXES = ("module.", "model.")
"""What data-parallel and averaging wrappers, and Lightning's modules, put before names."""
COUNT = "n_averaged"
"""What `AveragedModel` has beside its module."""
COMPILED = "_orig_mod"
"""The module in a wrapper of `torch.compile`."""


class Mismatch(NamedTuple):
    """An entry that has another shape in the file than in the model."""

    name: str
    in_file: tuple[int, ...]
    in_model: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class LoadReport:
    """What `load_checkpoint` did; printed, it is a few lines.

    Attributes:
        loaded: names of the model that got values.
        missing: names of the model that the file has not.
        unexpected: names of the file that the model has not.
        mismatched: entries left because of their shapes.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]

    def __repr__(self) -> str:
        return "\n".join([f"{len(self.loaded):,} entries loaded", *self.misfits()])

    def misfits(self) -> list[str]:
        """A line about each kind of entries that do not fit; none if all do."""
        lines = []
        for names, what in ((self.missing, "missing"), (self.unexpected, "unexpected")):
            if names:
                lines.append(f"{len(names):,} {what}: {listing(names)}")
        if self.mismatched:
            shapes = [
                f"{clip(name, 70)} {clip(list(file), 50)}, expected {clip(list(model), 50)}"
                for name, file, model in self.mismatched[:4]
            ]
            more = len(self.mismatched) - len(shapes)
            lines.append(
                f"{len(self.mismatched):,} of another shape: {'; '.join(shapes)}"
                + (f" and {more:,} more" if more else "")
            )
        return lines


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    strict: bool = True,
    *,
    key: str | None = None,
    finite: bool = True,
) -> LoadReport:
    """Load parameters and buffers into a model.

    All is checked before the first value is written: after an error, the model is as before.

    Args:
        model: gets the values, in its own dtypes and on its devices. May be wrapped, by
            `torch.compile`, data parallelism or `AveragedModel`: the module inside is loaded.
        path: safetensors, or a file of `torch.save`, see `read_checkpoint`. What wrappers put
            before the names is left out: "module.", "_orig_mod.", "model.", also one in another.
        strict: refuse missing and unknown names and other shapes. Without it, entries that do not
            fit are left as they are in the model, and reported; so a network for other tasks or
            classes starts from what fits.
        key: of the parameters in the file, see `read_checkpoint`.
        finite: refuse NaN and infinity, also where they come from converting to the model's dtype.

    Returns:
        What was loaded and what was left.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is truncated, corrupt or holds something else; naming the
            entry, for integers, booleans or complex values of a floating-point parameter, values
            that an integer buffer cannot hold, values that are not finite, and sparse, quantised or
            meta tensors; for a model on the meta device.
        RuntimeError: if `strict`, naming the entries that do not fit; never all of many.
    """
    return load_state(model, _read(path, key), path, strict=strict, finite=finite)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    finite: bool = True,
) -> LoadReport:
    """`load_checkpoint` for what was read; `path` is for errors."""
    model = _unwrapped(model)
    own = model.state_dict()
    names = {plain: name for name, plain in _plain_names(model, own).items()}
    state = fitting_names(state, names.__contains__)
    report = _compare(state, {plain: own[name] for plain, name in names.items()})
    if strict:
        _check_complete(report, path)
    for name in report.loaded:
        reason = _refusal(state[name], own[names[name]], finite)
        if reason:
            raise ValueError(f"{shown(path)}: {clip(name, 200)}: {reason}")
    try:
        model.load_state_dict({names[name]: state[name] for name in report.loaded}, strict=False)
    except RuntimeError as error:
        raise RuntimeError(f"{shown(path)}: {clip(error, 1000)}") from None
    return report


def check_names_and_shapes(
    model: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Refuse what `load_state` would, by names and shapes alone: for models on the meta device.

    Raises:
        RuntimeError: naming the entries that do not fit.
    """
    _check_complete(_compare(state, model.state_dict()), path)


def read_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """The names and tensors of a checkpoint, on the CPU.

    Pickles are read with ``weights_only=True``: no code in them is run. Scalars and arrays of
    numpy, paths and common kinds of settings beside the parameters are passed over.

    Args:
        path: safetensors, or a file of `torch.save`: a `state_dict`, or a dict that has one under
            one of `WRAPPERS`, or else of `AVERAGES`. Where several of these are there, as "model"
            and "model_ema", the one of `WRAPPERS` is taken; two of `WRAPPERS` are refused.
        key: take what is under this key instead, such as "model_ema".

    Returns:
        Tensors by name. "_orig_mod." of compiled modules is left out, and "module." if all names
        begin with it (with the "n_averaged" of `AveragedModel`).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is truncated, corrupt or holds something else.
    """
    state = _read(path, key)
    if all(name.startswith("module.") or name == COUNT for name in state):
        state = fitting_names(state, lambda name: not name.startswith("module.") and name != COUNT)
    return state


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model's parameters and buffers as safetensors, with the arguments of `sca_mtl`.

    Names are those of the model without wrappers (`torch.compile`, data parallelism,
    `AveragedModel`). The file appears under its name complete or not at all: it is written beside
    it and renamed, so that a checkpoint from before survives an interruption.

    Args:
        model: what to save. Backbone arguments that are no plain data (such as the class of a
            norm) or not known to be harmless are not noted, which a warning tells;
            `xattn_models.predict.from_checkpoint` asks for them then.
        path: of the file.

    Raises:
        TypeError: naming an entry of the state that is no dense tensor with values.
        OSError: if the file cannot be written.
    """
    from safetensors.torch import save

    model = _unwrapped(model)
    own = model.state_dict()
    state = {}
    for name, plain in _plain_names(model, own).items():
        value = own[name]
        if not isinstance(value, Tensor) or _kind(value) != "dense":
            kind = _kind(value) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"model: {name} is {kind}, expected a dense tensor")
        state[plain] = value.detach().cpu().contiguous().clone()
    noted = {"format": "pt"}
    if isinstance(model, SCAMTL) and model.settings is not None:
        noted[metadata.KEY], left = metadata.note(model.settings)
        if left:
            warnings.warn(f"{shown(path)} does not note {left}", stacklevel=2)
    data = save(state, metadata=noted)
    with replacing(path) as file:
        file.write(data)


def fitting_names(
    state: Mapping[str, Tensor], is_known: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Leave out `PREFIXES` one by one, from all names that have them, until some name is known."""
    state = dict(state)
    for _ in range(4):  # of wrappers in wrappers
        if any(is_known(name) for name in state):
            break
        prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        if all(name.startswith(prefix) or name == COUNT for name in state):
            state.pop(COUNT, None)
        renamed = {name.removeprefix(prefix): value for name, value in state.items()}
        if len(renamed) < len(state):
            break
        state = renamed
    return state


def _read(path: str | os.PathLike[str], key: str | None) -> dict[str, Tensor]:
    path = Path(path)
    if not os.path.isfile(path):
        folder = ", but a folder" if os.path.isdir(path) else ""
        raise FileNotFoundError(f"{shown(path)}: no such file{folder}")
    content = _read_safetensors(path) if is_safetensors(path) else read_pickle(path)
    content = _parameters(content, path, key)
    if not isinstance(content, Mapping) or not content:
        kind = "nothing" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{shown(path)}: got {kind}, expected names and tensors")
    wrong = [x for x in content if not isinstance(x, str) or not isinstance(content[x], Tensor)]
    if wrong:
        raise ValueError(
            f"{shown(path)}: expected names and tensors, or those under one of "
            f"{(*WRAPPERS, *AVERAGES)}, or under another key that is given as key; "
            f"{listing(wrong)} are no tensors"
        )
    state = {_without_compiled(name): value for name, value in content.items()}
    if len(state) < len(content):
        raise ValueError(f"{shown(path)}: has names twice, with and without {COMPILED}")
    return state


def _parameters(content: Any, path: Path, key: str | None) -> Any:
    """What is under one of the keys of wrappers, or all."""
    keys = []
    if isinstance(content, Mapping):
        keys = [k for k in content if isinstance(k, str) and _has_tensors(content[k])]
    if key is not None:
        if key not in keys:
            raise ValueError(
                f"{shown(path)}: key: got {clip(repr(key), 100)}, expected one with tensors: "
                f"{listing(keys, 12) or 'the file has none'}"
            )
        return content[key]
    found = [k for k in WRAPPERS if k in keys] or [k for k in AVERAGES if k in keys]
    if len(found) > 1:
        raise ValueError(f"{shown(path)}: has parameters under {found}: choose one by key")
    return content[found[0]] if found else content


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(x, Tensor) for x in value.values())


def _without_compiled(name: str) -> str:
    return re.sub(rf"(^|(?<=\.)){COMPILED}\.", "", name)


def _inner(module: nn.Module) -> str | None:
    """Name of the module that a wrapper has inside."""
    if COMPILED in module._modules:
        return COMPILED
    if isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel)):
        return "module"
    return None


def _unwrapped(model: nn.Module) -> nn.Module:
    while (inner := _inner(model)) is not None:
        model = model.get_submodule(inner)
    return model


def _plain_names(model: nn.Module, own: Mapping[str, Any]) -> dict[str, str]:
    """Names of entries without those of wrappers within the model, by the names with them."""
    wrappers = {
        f"{name}.{inner}.": f"{name}."
        for name, module in model.named_modules()
        if (inner := _inner(module)) is not None
    }
    plain = {}
    for name in own:
        short = name
        for wrapper in sorted(wrappers, key=len, reverse=True):
            if short.startswith(wrapper):
                short = wrappers[wrapper] + short[len(wrapper) :]
        plain[name] = short
    return plain


def _compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> LoadReport:
    loaded, mismatched = [], []
    for name, value in state.items():
        if name in own and value.shape == own[name].shape:
            loaded.append(name)
        elif name in own:
            mismatched.append(Mismatch(name, tuple(value.shape), tuple(own[name].shape)))
    # torch does not ask for this one, which checkpoints of its first years have not.
    missing = [x for x in own if x not in state and not x.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    return LoadReport(tuple(loaded), tuple(missing), tuple(unexpected), tuple(mismatched))


def _check_complete(report: LoadReport, path: str | os.PathLike[str]) -> None:
    misfits = "\n".join(report.misfits())
    if misfits:
        raise RuntimeError(f"{shown(path)}: does not fit the model: {misfits}")


def _kind(value: Tensor) -> str:
    if value.is_quantized:
        return "quantised"
    if value.is_meta:
        return "on the meta device"
    if value.layout is not torch.strided or value.is_nested:
        return "sparse or nested"
    return "dense"


def _refusal(value: Tensor, target: Tensor, finite: bool) -> str | None:
    """Why a value of the right shape is not taken."""
    if target.is_meta:
        return "the model has no memory for it (device meta)"
    if _kind(value) != "dense":
        return f"got a tensor that is {_kind(value)}, expected a dense one with values"
    expected = f"got {value.dtype}, expected {target.dtype}"
    if value.is_complex() and not target.is_complex():
        return f"{expected} or another real type"
    if not (target.is_floating_point() or target.is_complex()):
        fits = torch.equal(value.to(target.dtype).to(value.dtype), value)
        return None if fits else f"{expected} or values that it can hold"
    if not (value.is_floating_point() or value.is_complex()):
        return f"{expected} or another floating-point type"
    converted = value.to(target.dtype)
    if converted.dtype.itemsize == 1:  # torch does not tell it of all of these
        converted = converted.float()
    if finite and not bool(torch.isfinite(converted).all()):
        count = int((~torch.isfinite(converted)).sum())
        return (
            f"{count:,} of {value.numel():,} values are not finite as {target.dtype}; "
            "finite=False takes them"
        )
    return None


def is_safetensors(path: Path) -> bool:
    """Whether a file that `read_checkpoint` takes is no file of `torch.save`, by its beginning.

    Those begin as a zip or as a pickle. The first eight bytes of safetensors are the length of a
    header, which follows as JSON.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return (start[:2] != b"PK" and start[:1] != b"\x80") or start[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # damaged bytes lead to any kind
        raise ValueError(
            f"{shown(path)}: neither safetensors nor a file of torch.save, truncated or corrupt: "
            f"{clip(error)}"
        ) from None
