"""Who else looks at the operations that run: compilers, tracers, transforms, modes.

They follow tensors, not memory. While one looks, nothing is written to memory that is given, and
nothing is decided by addresses.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_recorded() -> bool:
    """Whether operators are recorded by name: by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_observed() -> bool:
    """Whether operations are recorded, transformed, or seen by a dispatch mode (fake tensors)."""
    return is_recorded() or is_transformed() or torch._C._len_torch_dispatch_stack() > 0
