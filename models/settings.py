"""What a checkpoint tells of its network, and what contradicts it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import metadata
from .checkpoints import fitting_names, is_safetensors, read_checkpoint
from .files import clip, shown

FREE = ("pretrained", "recompute")
"""Arguments of `sca_mtl` that are no part of what the network computes."""


@dataclass(frozen=True)
class Told:
    """What a checkpoint tells.

    Attributes:
        state: its tensors, by the names of an `SCAMTL`.
        targets: tasks that have heads.
        sources: numbers of outputs by task, targets and auxiliary tasks.
        arguments: of `sca_mtl`, as far as they are known; "tasks" if their order is.
        left_out: names of backbone arguments that could not be noted.
    """

    state: Mapping[str, Tensor]
    targets: frozenset[str]
    sources: Mapping[str, int]
    arguments: Mapping[str, Any]
    left_out: Sequence[str] = field(default=())


def read_settings(path: str | os.PathLike[str], key: str | None = None) -> Told:
    """Read a checkpoint of SCA-MTL.

    Tasks and their order are known from the settings in the metadata of safetensors, or as the
    order of the parameters in a pickle (unless that is alphabetical, as after a detour by
    safetensors).

    Args:
        path: see `read_checkpoint`.
        key: see `read_checkpoint`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a damaged file, a checkpoint of something else, metadata that is not plain
            settings (see `xattn_models.metadata`), tasks or numbers that are absurd, and metadata
            and parameters that contradict each other.
    """
    path = Path(path)
    state = fitting_names(
        read_checkpoint(path, key), lambda name: name.startswith(("heads.", "scale_0."))
    )
    targets = _channels(state, "heads.", ".last_layer.3.weight")
    sources = _channels(state, "scale_0.decoders.", ".weight")
    if not targets or not targets.keys() <= sources.keys():
        raise ValueError(
            f"{shown(path)}: no checkpoint of SCA-MTL: it has no parameters "
            "heads.<task>.last_layer.3.weight and scale_0.decoders.<task>.weight"
        )
    try:
        metadata.check_tasks(sources)
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from None
    _check_size(path, state)
    arguments: dict[str, Any] = {"num_outputs": sources}
    noted = _noted(path)
    if noted is not None:
        _check_noted(path, noted, targets, sources)
        arguments = noted
    elif not is_safetensors(path) and list(state) != sorted(state):
        arguments["tasks"] = list(targets)
        if list(sources) != list(targets):
            arguments["auxiliary_tasks"] = list(sources)
    left_out = arguments.pop(metadata.LEFT_OUT, ())
    return Told(state, frozenset(targets), sources, arguments, left_out)


def check_given(path: str | os.PathLike[str], told: Told, given: Mapping[str, Any]) -> None:
    """Refuse arguments of `sca_mtl` that contradict a checkpoint.

    Raises:
        ValueError: naming the argument and both values.
    """
    known = dict(told.arguments)
    if "tasks" in known:
        known["auxiliary_tasks"] = known.get("auxiliary_tasks") or known["tasks"]
    if told.left_out:
        known.pop("backbone_arguments", None)
    for name, value in given.items():
        expected: Any = "nothing"
        if name in known and name not in FREE:
            expected = known[name]
            fits = _plain(value) == _plain(expected)
        elif name in ("tasks", "auxiliary_tasks"):
            expected = sorted(told.targets if name == "tasks" else told.sources)
            fits = sorted(map(str, value)) == expected
        else:
            continue
        if not fits:
            raise ValueError(
                f"{shown(path)}: {name}: got {clip(repr(value))}, but the checkpoint has "
                f"{clip(repr(expected))}; if the checkpoint is wrong, use sca_mtl and "
                "load_checkpoint"
            )


def _plain(value: Any) -> Any:
    """For comparing: lists for tuples, an empty dict for None."""
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return {} if value is None else value


def _noted(path: Path) -> dict[str, Any] | None:
    from safetensors import safe_open

    if not is_safetensors(path):
        return None
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(metadata.KEY)
    if text is None:
        return None
    try:
        return metadata.parse(text)
    except ValueError as error:
        raise ValueError(f"{shown(path)}: settings in the metadata: {error}") from None


def _check_noted(
    path: Path, noted: Mapping[str, Any], targets: Mapping[str, int], sources: Mapping[str, int]
) -> None:
    """Compare metadata with parameters, so that nothing is made that the file does not hold."""
    names = noted.get("auxiliary_tasks") or noted["tasks"]
    for field_, said, found in (
        ("tasks", sorted(noted["tasks"]), sorted(targets)),
        ("auxiliary_tasks", sorted(names), sorted(sources)),
        ("num_outputs", noted["num_outputs"], dict(sources)),
    ):
        if said != found:
            raise ValueError(
                f"{shown(path)}: settings in the metadata: {field_}: got {clip(said)}, but the "
                f"parameters are those of {clip(found)}"
            )


def _check_size(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse parameters that a file of this size cannot hold: a few values seen as many."""
    claimed = sum(x.numel() * x.dtype.itemsize for x in state.values())
    held = path.stat().st_size
    if claimed > 4 * held:
        raise ValueError(
            f"{shown(path)}: claims {claimed:,} bytes of parameters, but has {held:,} bytes"
        )


def _channels(state: Mapping[str, Tensor], prefix: str, suffix: str) -> dict[str, int]:
    """Output channels of the convolutions called prefix + task + suffix, by task."""
    return {
        name[len(prefix) : -len(suffix)]: value.shape[0]
        for name, value in state.items()
        if name.startswith(prefix) and name.endswith(suffix) and value.dim() == 4
    }
