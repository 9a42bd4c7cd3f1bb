# mypy: disable-error-code="import-untyped"
"""The Triton engine's view of a process: whether it can run, how, and how problems reach kernels.

A kernel gets a whole list of edges in one launch. Addresses, strides, token counts and edges are
rows of one int64 table in device memory, which a kernel indexes by slot. Where they come from:

* Outside of a CUDA graph tables are cached by content, device and stream, so that repeated calls on
  the same memory copy nothing.
* While a graph is captured nothing is copied from the host, which a replay would do again from
  memory that is gone: a small kernel writes the table from its own arguments, which the graph
  keeps, into memory of the graph's pool. Cached tables are not used there, as a graph may outlive
  them. As ever with Triton, a call with the same shapes must have run before: compiling and loading
  do not go with capturing.
* :meth:`Table.by_kernel` leaves the table to the first kernel of an operator, which has addresses
  as arguments and the rest from a template: the same in a graph and outside, and no launch more.
  Templates depend on shapes alone. One that a graph has used is kept for good.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_kernels.problem import Problem

#: Widest queries, keys, values: per head for the softmax operator.
MAX_WIDTH = 384
MIN_VERSION = (3, 6)

#: Numbers in a row of the table that describes a slot: address, strides of batch, channel and
#: token in elements, tokens.
ROW = 5

_CACHED_TABLES = 256

#: So few that in tests, too, a program has several works.
_PROGRAMS_INTERPRETED = 5


@functools.cache
def load_error() -> str | None:
    """Return why the engine cannot be used in this process at all; None if it can."""
    try:
        import triton
    except ImportError as error:
        return f"Triton does not load: install xattn_kernels[triton] ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_VERSION:
        expected = ".".join(map(str, MIN_VERSION))
        return f"Triton {triton.__version__} is too old, {expected} or newer is needed"
    if interpreting():
        return None
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    return None


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def refusals(problem: Problem, dtypes: Sequence[torch.dtype] | None = None) -> list[str]:
    """Why the Triton kernels, which share most of their limits, cannot run a problem."""
    reasons = []
    device = "cpu" if interpreting() else "cuda"
    if problem.device != device:
        how = " in Triton's interpreter" if device == "cpu" else ""
        reasons.append(f"runs on {device.upper()} tensors{how}, not on {problem.device}")
    elif device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        reasons.append(f"needs compute capability 8.0, not {torch.cuda.get_device_capability()}")
    if problem.dtype is torch.float64:
        reasons.append("has no float64 kernels")
    width = max(problem.channels, problem.value_channels) // problem.heads
    if width > MAX_WIDTH:
        per_head = " a head" if problem.heads > 1 else ""
        reasons.append(f"takes up to {MAX_WIDTH} channels{per_head}, not {width}")
    if problem.transformed:
        reasons.append("kernels have no rules for torch.func transforms and forward-mode gradients")
    return reasons


def precision(dtype: torch.dtype) -> str:
    """How matrix products of features of ``dtype`` are computed; sums are float32 in all cases.

    float32 is exact ("ieee") unless ``torch.backends.cuda.matmul.fp32_precision`` asks for tf32.
    float16 features are multiplied as tf32: as many bits, but the range of float32, which states
    and features close to zero need.
    """
    if dtype is torch.float16:
        return "tf32"
    if dtype is torch.bfloat16:
        return "ieee" if interpreting() else "bf16"  # the interpreter's bfloat16 products are wrong
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of ``x``, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def language_type(dtype: torch.dtype) -> Any:
    """The same type in Triton."""
    import triton.language as tl

    return {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }[dtype]


class Layout(NamedTuple):
    """What a compiled kernel may assume of all tensors of an argument."""

    minor: str
    """``"n"`` if tokens lie side by side, ``"c"`` if channels do, else ``""``."""
    vector: int
    """Elements that can be accessed at once along the minor dimension, 1 for no such dimension."""
    wide: bool
    """Whether offsets within a sample need 64 bits."""


def layout(slots: Sequence[Tensor | None]) -> Layout:
    """Return what (B, C, N) tensors have in common; missing and empty ones do not count."""
    present = [x for x in slots if x is not None and x.numel() > 0]
    if not present:
        return Layout("n", 1, False)
    wide = False
    for x in present:
        _, stride_c, stride_n = x.stride()
        wide = wide or (x.size(1) + 512) * stride_c + (x.size(2) + 512) * stride_n >= 2**31
    if all(x.stride(2) == 1 for x in present):
        minor, other, extent = "n", 1, 2
    elif all(x.stride(1) == 1 for x in present):
        minor, other, extent = "c", 2, 1
    else:
        return Layout("", 1, wide)
    vector = 16 // present[0].element_size()
    for x in present:
        size = x.element_size()
        while vector > 1 and (
            x.data_ptr() % (vector * size)
            or (x.size(0) > 1 and x.stride(0) % vector)
            or x.stride(other) % vector
            or x.size(extent) % vector
        ):
            vector //= 2
    return Layout(minor, vector, wide)


def layout_constants(**layouts: Layout) -> dict[str, Any]:
    """Constants of kernels that describe their arguments, with the names of these in front."""
    constants: dict[str, Any] = {}
    for name, (minor, vector, wide) in layouts.items():
        constants |= {f"{name}_MINOR": minor, f"{name}_VECTOR": vector, f"{name}_WIDE": wide}
    return constants


class Table:
    """Rows under construction; each ``add`` returns where in the table its rows begin."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self._slots: list[tuple[int, Tensor]] = []

    def add(self, values: Sequence[int]) -> int:
        """Add numbers."""
        start = len(self.values)
        self.values.extend(values)
        return start

    def add_slots(self, slots: Sequence[Tensor | None]) -> int:
        """Add (B, C, N) tensors; a missing one has address 0 and no tokens."""
        start = len(self.values)
        for x in slots:
            if x is not None:
                self._slots.append((len(self.values), x))
            self.values.extend((0,) * ROW if x is None else (x.data_ptr(), *x.stride(), x.size(2)))
        return start

    def add_lists(self, lists: Sequence[Sequence[int]]) -> int:
        """Add lists: where each begins, relative to the first row, and where the last one ends."""
        first = len(lists) + 1
        starts = [first]
        for members in lists:
            starts.append(starts[-1] + len(members))
        return self.add([*starts, *(member for members in lists for member in members)])

    def on(self, device: torch.device) -> Tensor:
        """The table in the memory of ``device``, good for launches on its current stream."""
        if device.type != "cuda":
            return torch.tensor(self.values, dtype=torch.int64, device=device)
        if torch.cuda.is_current_stream_capturing():
            return _write(self.values, device)
        _load_writer(device.index)
        key = (tuple(self.values), device.index, torch.cuda.current_stream(device).cuda_stream)
        with _lock:
            table = _tables.get(key)
            if table is not None:
                _tables.move_to_end(key)
                return table
        table = torch.tensor(self.values, dtype=torch.int64).to(device)
        with _lock:
            _tables[key] = table
            while len(_tables) > _CACHED_TABLES:
                _tables.popitem(last=False)
        return table

    def by_kernel(self, device: torch.device, runs: bool) -> Unwritten:
        """The table as a kernel with ``complete_table`` writes it before it does anything else.

        Where that kernel has nothing to do, and so does not run, the table is written already.
        """
        from xattn_kernels.engines.triton.table_kernel import BASES

        values, numbers = self.values.copy(), dict[int, int]()
        for place, x in self._slots:
            base = x.untyped_storage().data_ptr()
            number = numbers.setdefault(base, len(numbers))
            values[place] = -1 - (number + BASES * (x.data_ptr() - base))
        fits = runs and len(numbers) <= BASES
        template = _template(tuple(values), device) if fits else None
        if template is None:
            table = self.on(device)
            return Unwritten(table, table, 0, *[0] * BASES)
        bases = [*numbers, *[0] * (BASES - len(numbers))]
        return Unwritten(torch.empty_like(template), template, len(values), *bases)


class Unwritten(tuple[Any, ...]):
    """The arguments of a kernel that writes a table, which is the first of them."""

    def __new__(cls, *arguments: Any) -> Unwritten:
        return super().__new__(cls, arguments)

    @property
    def table(self) -> Tensor:
        """On the device; complete after the kernel."""
        table: Tensor = self[0]
        return table


_tables: OrderedDict[Any, Tensor] = OrderedDict()
_templates: OrderedDict[Any, Tensor] = OrderedDict()
_kept_templates: dict[Any, Tensor] = {}
_lock = threading.Lock()


def _template(values: tuple[int, ...], device: torch.device) -> Tensor | None:
    """A template on a device; None if one had to be copied there while a graph is captured."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    key = values, device.index
    capturing = torch.cuda.is_current_stream_capturing()
    with _lock:
        template = _kept_templates.get(key)
        if template is None:
            template = _templates.get(key)
            if template is not None:
                _templates.move_to_end(key)
                if capturing:
                    _kept_templates[key] = template
    if template is not None or capturing:
        return template
    template = torch.tensor(values, dtype=torch.int64).to(device)
    with _lock:
        if len(_templates) >= _CACHED_TABLES:
            torch.cuda.synchronize()  # they may be in use on any stream
            while len(_templates) >= _CACHED_TABLES:
                _templates.popitem(last=False)
        _templates[key] = template
    return template


def _write(values: Sequence[int], device: torch.device) -> Tensor:
    """A table written by kernels that have its numbers as arguments."""
    from xattn_kernels.engines.triton.table_kernel import ARGUMENTS, write_kernel

    table = torch.empty(-(-len(values) // ARGUMENTS) * ARGUMENTS, dtype=torch.int64, device=device)
    padded = [*values, *[0] * (table.numel() - len(values))]
    for start in range(0, len(padded), ARGUMENTS):
        write_kernel[(1,)](table, start, *padded[start : start + ARGUMENTS], num_warps=1)
    return table


@functools.cache
def _load_writer(device: int) -> None:
    """Load the kernel that graphs need, which may not be possible while one is captured."""
    _write([0], torch.device("cuda", device))


def programs(works: int, warps: int, device: torch.device) -> int:
    """Programs that go through a list of works: as many as a GPU may hold, 16 warps a processor."""
    if device.type != "cuda":
        return min(works, _PROGRAMS_INTERPRETED)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(works, processors * max(16 // warps, 1))


def pieces(width: int) -> tuple[int, int]:
    """Split a width into one or two powers of two from 16 up, the second one 0 if not needed.

    72 becomes (64, 16) and not 128; 48 becomes (32, 16); 60 becomes (64, 0).
    """
    first = 16
    while 2 * first <= width:
        first *= 2
    if width <= first:
        return first, 0
    second = 16
    while second < width - first:
        second *= 2
    return (first, second) if second < first else (2 * first, 0)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def blocks(tokens: Sequence[int], block: int) -> int:
    """Tiles of the slot with the most tokens."""
    return max((ceil_div(n, block) for n in tokens), default=0)
