"""What other packages in the environment can and cannot do here."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

#: Operators that torchvision registers Python functions for when it is imported.
TORCHVISION_OPS = ("nms", "qnms")


@functools.cache
def torchvision_ops_error() -> str | None:
    """Return why torchvision's C++ operators are not there; None if they are.

    They are absent where torchvision was built for another torch, or for a CUDA that this machine
    has not, as its wheels on package indexes are. Then ``import torchvision`` fails, and so does
    ``import timm``, although nothing that timm's networks compute needs these operators.
    ``xattn_models.timm_compat.import_timm`` gets by without them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return "torchvision is not installed"
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob("_C*.so"))
    if not libraries:
        return "torchvision was installed without its C++ operators"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"{libraries[0].name} of torchvision does not load: {error.__cause__ or error}"
    missing = [name for name in TORCHVISION_OPS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        return f"{libraries[0].name} of torchvision lacks {', '.join(missing)}"
    return None
