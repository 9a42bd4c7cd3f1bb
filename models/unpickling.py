"""Pickles of `torch.save`, read without running anything that is in them."""

from __future__ import annotations

import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .files import clip, shown


class Placeholder:
    """Stands for a value that training programs save beside the parameters; holds nothing."""

    def __init__(self, *_: object) -> None:
        """Take the arguments of whatever it stands for."""

    def __new__(cls, *_: object) -> Placeholder:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Take the state of whatever it stands for."""


def _mapping(*_: object) -> OrderedDict[Any, Any]:
    return OrderedDict()


_VALUES = (
    *("argparse.Namespace", "typing.Any"),
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    *("numpy.dtype", "numpy.ndarray"),
    *(
        f"numpy.{core}.multiarray.{name}"  # the second is the name before numpy 2
        for core in ("_core", "core")
        for name in ("scalar", "_reconstruct")
    ),
    *(f"omegaconf.{name}Config" for name in ("dictconfig.Dict", "listconfig.List")),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
)
_MAPPINGS = (
    "easydict.EasyDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_STAND_INS: list[Any] = [
    *((Placeholder, name) for name in _VALUES),
    *((OrderedDict, name) for name in _MAPPINGS),
    (_mapping, "collections.defaultdict"),
]
"""What is made instead of the classes and functions of these names.

Not the classes themselves: only tensors are wanted, and numpy's types can be brought by a crafted
state to take numbers for addresses. So a file is read the same with any numpy, or without the
packages that wrote it.
"""
_lock = threading.Lock()


def read_pickle(path: Path) -> Any:
    """The content of a file of `torch.save`, on the CPU, read with ``weights_only=True``.

    Of what is not a tensor, a number, a text or a container of them, arrays and scalars of numpy,
    paths, `argparse.Namespace`, and settings of OmegaConf, EasyDict and Lightning come as
    placeholders; a mapping that is a class of its own comes as an `OrderedDict`.

    Raises:
        ValueError: naming the file, if it holds other classes or functions, or is damaged.
    """
    try:
        with _stand_ins():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Around the reason, torch advises to read the file without weights_only.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        found = re.search(r"GLOBAL (\S+)", reason)
        if found is None:
            raise ValueError(
                f"{shown(path)}: truncated, corrupt or no file of torch.save: {clip(reason)}"
            ) from None
        raise ValueError(
            f"{shown(path)}: not read, for it holds more than tensors and plain values: it needs "
            f"{clip(found[1], 100)}; nothing in it was run. Save the state_dict alone"
        ) from None
    except Exception as error:  # damaged bytes lead to any kind
        raise ValueError(
            f"{shown(path)}: truncated or corrupt checkpoint: {clip(error) or type(error).__name__}"
        ) from None


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Have torch make the stand-ins; classes that the user has allowed otherwise stay allowed."""
    names = {name for _, name in _STAND_INS}
    with _lock:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([x for x in before if _name(x) not in names])
        torch.serialization.add_safe_globals(_STAND_INS)
        try:
            yield
        finally:
            after = torch.serialization.get_safe_globals()  # more, if torch imported more of itself
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([x for x in after if x not in _STAND_INS])
            torch.serialization.add_safe_globals(before)


def _name(allowed: Any) -> str:
    if isinstance(allowed, tuple):
        return str(allowed[1])
    return f"{allowed.__module__}.{allowed.__qualname__}"
