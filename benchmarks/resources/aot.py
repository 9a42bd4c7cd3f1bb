# mypy: disable-error-code="import-untyped"
"""Compile kernels for GPUs that are not there, and say what they need of them.

``python -m benchmarks.resources.aot`` compiles every kernel for every published width, element type
and architecture and writes a table; see :mod:`benchmarks.resources.triton_table`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xattn_kernels.engines.triton.launch import OPTIONS, Launch

#: Shared memory of a program, in bytes, on cards of every compute capability.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

#: Instructions of the machine code that are counted, by how their names begin.
INSTRUCTIONS = {
    "tensor": ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA"),
    "fma": ("FFMA",),
    "special": ("MUFU",),
    "load": ("LDG", "LDGSTS", "UBLKCP"),
    "store": ("STG",),
    "local": ("LDL", "STL"),
}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


class Resources(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    spills: int
    """Instructions that store or load registers for want of them."""
    stack: int
    shared: int
    """Bytes of a program."""
    tf32: int
    """Products of tf32 operands among the instructions of the PTX."""
    widest_load: int
    """Bits that a thread loads from device memory at once, at most."""
    instructions: dict[str, int]


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compile what a recorded launch would run, for a compute capability such as 90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    names = launch.kernel.arg_names
    for i, name in enumerate(names):
        if name in launch.constants:
            signature[name] = "constexpr"
            constants[(i,)] = launch.constants[name]
            continue
        value = launch.args[i]
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = launch.kernel.params[i].annotation_type
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, **OPTIONS},
    )


def resources(compiled: Any) -> Resources:
    """Registers, spills, shared memory and instruction mix of a compiled kernel."""
    ptx = compiled.asm["ptx"]
    report, machine_code = _tools(compiled.asm["cubin"])
    opcodes = re.findall(
        r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", machine_code, re.M
    )
    counts = {
        name: sum(opcode in prefixes for opcode in opcodes)
        for name, prefixes in INSTRUCTIONS.items()
    }
    loads = re.findall(r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)[^;]*;", ptx)
    return Resources(
        registers=_number(r"REG:(\d+)", report),
        spills=counts["local"],
        stack=_number(r"STACK:(\d+)", report),
        shared=compiled.metadata.shared,
        tf32=len(re.findall(r"(?:mma|tcgen05)[^;\n]*tf32", ptx)),
        widest_load=max((_bits(load) for load in loads), default=0),
        instructions=counts,
    )


def _tools(cubin: bytes) -> tuple[str, str]:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return (
            _run([str(folder / "cuobjdump"), "-res-usage", file.name]),
            _run([str(folder / "nvdisasm"), file.name]),
        )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _bits(load: str) -> int:
    if load.startswith("cp.async"):
        size = re.search(r"\],\s*\[[^\]]*\],\s*(?:0x)?([0-9a-f]+)", load)
        return 8 * int(size.group(1), 16) if size else 0
    width = re.search(r"\.(?:b|u|s|f)(\d+)", load)
    vector = re.search(r"\.v(\d)", load)
    return (int(width.group(1)) if width else 0) * (int(vector.group(1)) if vector else 1)
