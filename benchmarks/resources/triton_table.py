# mypy: disable-error-code="import-untyped"
"""What the Triton kernels take of a GPU, compiled for GPUs that need not be there.

``python -m benchmarks.resources.triton_table FILE`` compiles every kernel that operators launch,
for the published widths, every element type and architecture, and writes a table as JSON: one line
a kernel with registers, spills, shared memory and instruction mix. It takes some minutes; with
``--only OPERATOR ...`` the rows of other operators stay as they are.

A module of this package whose name ends in ``_cases`` adds operators by its ``OPERATORS``, a dict
of :class:`Operator` by name.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import pkgutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_kernels.engines.triton.launch import Launch, recorded
from xattn_kernels.schedule import Schedule

from . import aot

#: Widths of the published networks and tokens of a slot (multiples of 16, as theirs but 300).
SIZES = {36: 19200, 72: 4800, 144: 1200, 288: 304}
CAPABILITIES = tuple(aot.SHARED_LIMITS)
#: How features are stored and multiplied: ``tf32`` is float32 with tf32 products allowed.
TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}

#: Spilling instructions of a kernel that are tolerated, by how products are computed.
SPILL_BUDGET = {"bf16": 80, "tf32": 64, "ieee": 16}


#: Makes as many (1, C, N) tensors as it is asked for, four by default.
Slots = Callable[..., list[Tensor]]


class Operator(NamedTuple):
    """How to have an operator launch all of its kernels."""

    call: Callable[[Slots, Schedule], None]
    """Runs everything once; nothing is computed, launches are only recorded."""
    widths: tuple[int, ...] = tuple(SIZES)
    types: tuple[str, ...] = tuple(TYPES)
    flags: tuple[str, ...] = ()
    """Constants that tell launches of one kernel apart, shown in the table where they are True."""


class Case(NamedTuple):
    """A call of an operator whose kernels are compiled."""

    operator: str
    channels: int
    type: str

    def launches(self, capability: int = 90) -> list[Launch]:
        """The launches of a forward and, where there is one, a backward pass; each kind once."""
        schedule = Schedule.cross_task(4)
        dtype = TYPES[self.type]

        def slots(count: int = 4) -> list[Tensor]:
            shape = (1, self.channels, SIZES[self.channels])
            return [torch.empty(shape, dtype=dtype) for _ in range(count)]

        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.type == "tf32" else "ieee"
        try:
            with recorded(capability) as found:
                operators()[self.operator].call(slots, schedule)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        unique = {key_of(launch): launch for launch in found}
        return list(unique.values())


def key_of(launch: Launch) -> tuple[Any, ...]:
    """What tells compiled kernels apart."""
    types = tuple(x.dtype for x in launch.args if isinstance(x, Tensor))
    constants = tuple(sorted((name, str(x)) for name, x in launch.constants.items()))
    return (launch.kernel.__name__, types, constants, launch.warps, launch.stages)


@functools.cache
def operators() -> Mapping[str, Operator]:
    """All operators by name: those below, then those of the modules with cases of their own."""
    found = dict(_OPERATORS)
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.endswith("_cases"):
            found |= importlib.import_module(f".{module.name}", __package__).OPERATORS
    return found


def cases(only: Iterable[str] | None = None) -> list[Case]:
    """All operators, or some, with their widths and types."""
    return [
        Case(name, width, type_)
        for name, operator in operators().items()
        if only is None or name in only
        for width in operator.widths
        for type_ in operator.types
    ]


def rows(chosen: Sequence[Case], capabilities: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Compile the kernels of cases; one row for each kernel, constants and architecture."""
    for case in chosen:
        for capability in capabilities:
            for launch in case.launches(capability):
                found = aot.resources(aot.compile_launch(launch, capability))
                flags = operators()[case.operator].flags
                yield {
                    "sm": capability,
                    "operator": case.operator,
                    "C": case.channels,
                    "type": case.type,
                    "kernel": launch.kernel.__name__,
                    "flags": [flag for flag in flags if launch.constants.get(flag) is True],
                    "products": launch.constants.get("DOT", "none"),
                    "warps": launch.warps,
                    **found._asdict(),
                }


def problems(row: dict[str, Any]) -> list[str]:
    """Why a row is not acceptable."""
    found = []
    if row["shared"] > aot.SHARED_LIMITS[row["sm"]]:
        found.append(f"{row['shared']} bytes of shared memory, the card has less")
    budget = SPILL_BUDGET.get(row["products"], 0)
    if row["spills"] > budget:
        found.append(f"{row['spills']} spilling instructions, the budget is {budget}")
    if row["tf32"] and row["products"] != "tf32":
        found.append("products of tf32 operands that nobody asked for")
    if row["products"] == "tf32" and not row["tf32"]:
        found.append("no products of tf32 operands")
    if row["products"] == "bf16" and not row["instructions"]["tensor"]:
        found.append("no tensor core instructions")
    if row["products"] != "ieee" and row["widest_load"] < 128:  # exact products have small tiles
        found.append(f"no load is wider than {row['widest_load']} bits")
    return found


def identity(row: dict[str, Any]) -> str:
    """What a row is about, as text."""
    flags = "".join(f" {flag}" for flag in row["flags"])
    where = f"sm_{row['sm']} {row['operator']} {row['type']} C={row['C']}"
    return f"{where} {row['kernel']}{flags}"


def _linear(slots: Any, schedule: Schedule) -> None:
    from xattn_kernels.ops.linear_cross_attention import triton as engine

    query, key, value, edges = slots(), slots(), slots(), schedule.triples_flat
    outputs, s, z = engine.forward(query, key, value, edges, None, None, "softplus", 1e-12)
    wanted = [True] * 12 + [False] * 2
    engine.backward(
        query, key, value, edges, s, z, outputs, None, None, "softplus", 1e-12, wanted
    )  # fmt: skip


def _softmax(slots: Any, schedule: Schedule) -> None:
    from xattn_kernels.ops.softmax_cross_attention import triton as engine

    query, key, value, edges = slots(), slots(), slots(), schedule.triples_flat
    outputs, lse = engine.forward(query, key, value, edges, 1, 0.1)
    engine.backward(
        query, key, value, outputs, edges, lse, outputs, lse, 1, 0.1, [True] * 12
    )  # fmt: skip


def _block(slots: Any, schedule: Schedule) -> None:
    from xattn_kernels.ops.cross_attention_block import triton as engine

    features, outputs = slots(), slots(schedule.num_outputs)
    channels, sets = features[0].size(1), schedule.num_weights
    weight = features[0].new_zeros(sets, 5, channels, channels)
    packed = engine.pack(weight, weight[..., 0], weight.dtype)
    engine.forward(features, packed, sets, schedule.edges_flat, 1e-12, outputs)


_OPERATORS = {
    "linear_cross_attention": Operator(_linear, flags=("WEIGHTED", "BY_MEMBER", "HAS_S")),
    "softmax_cross_attention": Operator(_softmax, flags=("WITH_KEYS", "WITH_VALUES")),
    "cross_attention_block": Operator(_block),
}


def write(file: Path, table: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON, one a line, in the order of the operators."""
    import triton

    order = {case: number for number, case in enumerate(cases())}
    kept = [row for row in table if _case(row) in order]
    kept.sort(key=lambda row: order[_case(row)])
    lines = ",\n".join(f"    {json.dumps(row)}" for row in kept)
    text = f'{{\n  "triton": "{triton.__version__}",\n  "kernels": [\n{lines}\n  ]\n}}\n'
    handle, name = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "w") as temporary:
        temporary.write(text)
    Path(name).chmod(0o644)
    Path(name).replace(file)


def _case(row: dict[str, Any]) -> Case:
    return Case(row["operator"], row["C"], row["type"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; returns 1 if a row is not acceptable."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources.triton_table",
        description="Compile all Triton kernels.",
    )
    parser.add_argument("file", type=Path, help="JSON file to write")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(operators()),
        metavar="OPERATOR",
        help="compile these, and keep what the file has of others",
    )
    options = parser.parse_args(arguments)
    chosen, fresh = cases(options.only), list[dict[str, Any]]()
    for number, case in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {case.operator} {case.type} C={case.channels}", flush=True)
        for row in rows([case], CAPABILITIES):
            fresh.append(row)
            for problem in problems(row):
                print(f"  {identity(row)}: {problem}", flush=True)
    others: list[dict[str, Any]] = []
    if options.only:
        written = json.loads(options.file.read_text())["kernels"]
        others = [row for row in written if _case(row) not in chosen]
    write(options.file, [*others, *fresh])
    bad = sum(bool(problems(row)) for row in fresh)
    print(f"{options.file}: {len(fresh)} kernels compiled, {bad} not acceptable")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
