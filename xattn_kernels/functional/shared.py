"""What the functions share."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch


def check_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, expected a positive finite number")


def no_autocast(device: str | None) -> contextlib.AbstractContextManager[Any]:
    """The slots are cast already: what the operators compute in is theirs to say."""
    return contextlib.nullcontext() if device is None else torch.autocast(device, enabled=False)
