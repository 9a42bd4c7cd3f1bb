"""Autocast, asked about in one place: torch refuses the question for devices that have none."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_CAST = (torch.float32, torch.bfloat16, torch.float16)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast asks for on a device type; None if it asks for nothing."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def cast_for_autocast(x: Tensor) -> Tensor:
    """`x` as torch's autocast casts it: floating-point tensors but float64, if it is enabled."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype not in _CAST else x.to(dtype)


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """A context without the autocast of a device type: its tensors are cast already."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
