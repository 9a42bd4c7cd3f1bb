"""The native CUDA module ``xattn_kernels._cuda``: loaded when first asked for, never at import."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xattn_kernels import build_record
from xattn_kernels._version import __version__
from xattn_kernels.problem import Problem

#: Widest queries, keys, values: per head for the softmax operator.
MAX_WIDTH = 384


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        module = importlib.import_module("xattn_kernels._cuda")
    except ModuleNotFoundError:
        record = build_record.read() or {}
        reason = (record.get("cuda") or {}).get("reason") or "install again on a machine with nvcc"
        return None, f"the native module _cuda was not built: {reason}"
    except (ImportError, RuntimeError) as error:
        return None, f"the native module _cuda does not load: {error}"
    if module.__version__ != __version__:
        return None, (
            f"the native module _cuda was built for version {module.__version__}, this is "
            f"{__version__}: install again"
        )
    if module.device_type == "cuda" and not torch.cuda.is_available():
        return None, "no CUDA device"
    return module, None


def load_error() -> str | None:
    """Return why the native CUDA module cannot be used; None if it can."""
    return _load()[1]


def module() -> Any:
    """Return the native CUDA module.

    Raises:
        RuntimeError: if it cannot be used.
    """
    found, reason = _load()
    if found is None:
        raise RuntimeError(reason)
    return found


def has_code(compiled: Sequence[str], capability: int) -> bool:
    """Whether a module for these architectures, in CMake's notation, runs on a GPU (90: 9.0).

    Machine code runs on its own architecture and on later ones of the same generation (86 on 89);
    that of variants such as 90a on its own alone; PTX on every later one.
    """
    for arch in compiled:
        match = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", arch)
        if match is None:  # a word such as "native", which is CMake's to know
            return True
        number, variant, kind = int(match[1]), match[2], match[3]
        if variant:
            found = number == capability
        else:
            same = kind != "-virtual" and number // 10 == capability // 10
            found = number <= capability and (same or kind != "-real")
        if found:
            return True
    return False


def refusals(problem: Problem) -> list[str]:
    """Why the CUDA kernels, which share most of their limits, cannot run a problem."""
    reasons = []
    device = module().device_type
    if problem.device != device:
        reasons.append(f"runs on {device.upper()} tensors, not on {problem.device}")
    elif device == "cuda":
        major, minor = torch.cuda.get_device_capability(problem.device_index)
        compiled = module().compiled_archs()
        if major < 8:
            reasons.append(f"needs compute capability 8.0, not {major}.{minor}")
        elif not has_code(compiled, 10 * major + minor):
            reasons.append(
                f"was built for {', '.join(compiled)}, not for compute capability {major}.{minor}: "
                "install again on this machine, or with XATTN_CUDA_ARCHS"
            )
    if problem.dtype is torch.float64:
        reasons.append("has no float64 kernels")
    width = max(problem.channels, problem.value_channels) // problem.heads
    if width > MAX_WIDTH:
        per_head = " a head" if problem.heads > 1 else ""
        reasons.append(f"takes up to {MAX_WIDTH} channels{per_head}, not {width}")
    if problem.transformed:
        reasons.append("kernels have no rules for torch.func transforms and forward-mode gradients")
    return reasons


class Scratch:
    """Device memory for the length of a call: the module asks for it once it knows how much."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory: Tensor | None = None

    def __call__(self, size: int) -> int:
        """Allocate ``size`` bytes and return their address."""
        self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.memory.data_ptr()


Context = tuple[int, int, bool, Callable[[int], int]]


def context(x: Tensor) -> Context:
    """What every function of the module takes first: the device, stream and precision of a call.

    The caller's stream is torch's current one on the device of ``x``. Memory that is freed when the
    call returns is given out again only to later work on that stream.
    """
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if not x.is_cuda:
        return 0, 0, tf32, Scratch(x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return x.get_device(), stream, tf32, Scratch(x.device)
