"""What a checkpoint's metadata may say of its network: data from a list, and nothing that is run.

Anybody can write metadata. It names no file, address, class or pretraining; what is not on the list
is refused, and numbers have bounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from .files import clip, listing

KEY = "sca_mtl"
"""Of safetensors' metadata: arguments of `sca_mtl`, as JSON."""
LEFT_OUT = "left_out"
"""Field with the names of backbone arguments that could not be noted."""

MAX_TASKS = 64
MAX_OUTPUTS = 65_536
"""Channels of one task's output."""
MAX_TEXT = 65_536
"""Characters of the JSON."""

FLAGS = ("conv_mlp", "qkv_bias", "strict_img_size", "use_grn")
LAYERS = ("act_layer", "feature_location", "norm_layer")
NUMBERS: Mapping[str, float] = {
    "attn_drop_rate": 1,
    "depths": 64,
    "dims": 8192,
    "drop_path_rate": 1,
    "drop_rate": 1,
    "embed_dim": 8192,
    "img_size": 2048,
    "ls_init_value": 1,
    "mlp_ratio": 16,
    "num_heads": 1024,
    "out_indices": 16,
    "proj_drop_rate": 1,
    "window_size": 32,
}
"""Arguments of timm's backbones that are numbers or lists of them, and the largest of each."""


def note(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Settings of an `SCAMTL` as text for the metadata.

    Backbone arguments that are not among `FLAGS`, `LAYERS` and `NUMBERS`, or not plain, are left
    out, and their names noted: `predict.from_checkpoint` asks for them. If anything else cannot be
    noted, nothing is, and `parse` says so.

    Returns:
        The text, and what was left out and what to do about it; empty if nothing was.
    """
    arguments: Mapping[Any, Any] = settings.get("backbone_arguments") or {}
    kept = {name: value for name, value in arguments.items() if _is_argument(name, value)}
    noted = {**settings, "backbone_arguments": kept or None}
    left = [name for name in arguments if name not in kept]
    if left:
        noted[LEFT_OUT] = left
    try:
        text = json.dumps(noted, allow_nan=False)
        parse(text)
    except (TypeError, ValueError) as error:
        return "{}", f"the network's settings ({clip(error)}): after this file, call sca_mtl"
    return text, f"backbone_arguments {listing(left)}: give them to from_checkpoint" if left else ""


def parse(text: str) -> dict[str, Any]:
    """Arguments of `sca_mtl` from the text of `note`; what was left out under `LEFT_OUT`.

    Raises:
        ValueError: naming the field that is missing, unknown or holds something else.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"got {len(text):,} characters, expected at most {MAX_TEXT:,}")
    try:
        noted = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"damaged JSON: {clip(error)}") from None
    if noted == {}:
        raise ValueError(
            "the network's settings could not be noted when the file was saved: make the network "
            "by sca_mtl, then load_checkpoint"
        )
    if not isinstance(noted, dict) or not {"tasks", "num_outputs"} <= noted.keys():
        raise ValueError("expected an object with tasks and num_outputs")
    unknown = noted.keys() - _FIELDS.keys()
    if unknown:
        raise ValueError(f"got the fields {listing(sorted(unknown))}, which no checkpoint has")
    for name, value in noted.items():
        holds, expected = _FIELDS[name]
        if not holds(value):
            raise ValueError(f"{name}: got {clip(repr(value), 200)}, expected {expected}")
    arguments = noted.get("backbone_arguments") or {}
    wrong = [name for name in arguments if not _is_argument(name, arguments[name])]
    if wrong:
        raise ValueError(
            f"backbone_arguments[{clip(repr(wrong[0]), 100)}]: got "
            f"{clip(repr(arguments[wrong[0]]), 200)}, expected an argument among "
            f"{[*FLAGS, *LAYERS, *NUMBERS]} with a plain value"
        )
    return noted


def check_tasks(outputs: Mapping[str, int]) -> None:
    """Refuse tasks that no file can be named after, and absurd numbers, before a network is made.

    Args:
        outputs: number of outputs by task, from a checkpoint.

    Raises:
        ValueError: naming the task.
    """
    if not _is_tasks(list(outputs)):
        raise ValueError(f"tasks: got {listing(outputs)}, expected {_FIELDS['tasks'][1]}")
    if not _is_outputs(outputs):
        raise ValueError(
            f"num_outputs: got {clip(dict(outputs))}, expected {_FIELDS['num_outputs'][1]}"
        )


def _is_integer(value: Any, largest: int) -> bool:
    return type(value) is int and 1 <= value <= largest


def _is_task(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w -]{1,64}", value) is not None


def _is_tasks(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= MAX_TASKS and all(map(_is_task, value))


def _is_outputs(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and _is_tasks(list(value))
        and all(_is_integer(count, MAX_OUTPUTS) for count in value.values())
    )


def _is_number(value: Any, largest: float) -> bool:
    return type(value) in (int, float) and abs(value) <= largest  # false for NaN


def _is_argument(name: Any, value: Any) -> bool:
    if value is None:
        return name in FLAGS or name in LAYERS or name in NUMBERS
    if name in FLAGS:
        return isinstance(value, bool)
    if name in LAYERS:
        return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_]{0,64}", value) is not None
    if name in NUMBERS:
        values = value if isinstance(value, (list, tuple)) else [value]
        return len(values) <= 16 and all(_is_number(x, NUMBERS[name]) for x in values)
    return False


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "tasks": (
        _is_tasks,
        f"1 to {MAX_TASKS} names of at most 64 letters, digits, spaces, - and _",
    ),
    "num_outputs": (_is_outputs, f"numbers from 1 to {MAX_OUTPUTS:,} by task"),
    "auxiliary_tasks": (lambda x: x is None or _is_tasks(x), "null or names of tasks"),
    "kind": (lambda x: x in ("linear", "softmax"), "'linear' or 'softmax'"),
    "heads": (lambda x: _is_integer(x, 1024), "a number from 1 to 1024"),
    "recompute": (lambda x: isinstance(x, bool) or x == "auto", "'auto', true or false"),
    "task_softmax": (lambda x: isinstance(x, bool), "true or false"),
    "backbone": (
        lambda x: isinstance(x, str) and re.fullmatch(r"\w{1,100}(\.\w{1,100})?", x) is not None,
        "the plain name of a timm model",
    ),
    "backbone_arguments": (lambda x: x is None or isinstance(x, dict), "null or an object"),
    LEFT_OUT: (
        lambda x: isinstance(x, list) and len(x) <= 64 and all(isinstance(n, str) for n in x),
        "names of arguments",
    ),
}
