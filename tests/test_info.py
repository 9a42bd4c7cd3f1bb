"""``python -m xattn_kernels info``: complete, truthful, and useful when something is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xattn_kernels
from xattn_kernels import __main__, build_record, info, registry
from xattn_kernels.engines import native


def test_command_prints_json() -> None:
    output = subprocess.run(
        [sys.executable, "-m", "xattn_kernels", "info", "--json"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    facts = json.loads(output)
    assert facts["version"] == xattn_kernels.__version__
    assert facts["packages"]["torch"] is not None
    assert [engine["name"] for engine in facts["engines"]] == list(registry.ENGINES)


def test_engines_say_why_they_are_missing() -> None:
    for engine in info.collect()["engines"]:
        assert engine["available"] is (engine["reason"] is None)


def test_cpu_facts() -> None:
    cpu = info.collect()["cpu"]
    assert cpu["threads"] == torch.get_num_threads()
    assert cpu["native"]["isa"] in cpu["native"]["available"]
    assert set(cpu["native"]["available"]) <= set(cpu["native"]["compiled"])


def test_text_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main(["info"])
    text = capsys.readouterr().out
    for word in (*registry.ENGINES, "threads", "XATTN_CUDA=", torch.__version__):
        assert word in text


def test_torchvision_without_its_operators() -> None:
    facts = info.collect()
    facts["packages"]["torchvision"] = "0.28.0"
    facts["torchvision_ops_error"] = "_C.so of torchvision does not load"
    assert "torchvision.ops cannot be used" in info.to_text(facts)
    facts["torchvision_ops_error"] = None
    assert "torchvision.ops" not in info.to_text(facts)


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's build record goes; the module is loaded before, by its own record."""
    native.load_error()
    path = tmp_path / "_build.json"
    monkeypatch.setattr(build_record, "PATH", path)
    return path


def test_reason_of_the_build_is_shown(record: Path) -> None:
    cuda = {"built": False, "requested": "auto", "reason": "no nvcc was found"}
    cpu = {"compiler": "GNU 12.2.0", "isas": ["portable"]}
    record.write_text(json.dumps({"version": "0.0.0", "python": "3.10", "cpu": cpu, "cuda": cuda}))
    text = info.to_text(info.collect())
    assert "CUDA module not built (XATTN_CUDA=auto): no nvcc was found" in text
    assert "the modules are of version 0.0.0" in text


def test_built_cuda_is_shown(record: Path) -> None:
    cuda = {"built": True, "toolkit": "13.0.88", "architectures": ["90a-real", "120"]}
    cpu = {"compiler": "GNU 12.2.0", "isas": ["portable"]}
    version = xattn_kernels.__version__
    record.write_text(json.dumps({"version": version, "cpu": cpu, "cuda": cuda}))
    assert "CUDA module: toolkit 13.0.88; 90a-real, 120" in info.to_text(info.collect())


def test_without_native_modules(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_error", lambda: "the native module _core is missing")
    facts = info.collect()
    assert facts["build"] is None
    assert facts["cpu"]["native"] is None
    assert "no record of a native build" in info.to_text(facts)


def test_corrupt_record(record: Path) -> None:
    record.write_text("{")
    with pytest.raises(RuntimeError, match=r"_build\.json"):
        build_record.read()
    assert "_build.json cannot be read" in info.to_text(info.collect())


def test_gpus_are_listed() -> None:
    facts = info.collect()
    facts["gpu"] = {
        "torch_cuda": "13.0",
        "devices": [{"name": "Card", "capability": "9.0", "memory_bytes": 80 << 30}],
    }
    text = info.to_text(facts)
    assert "torch is built with CUDA 13.0" in text
    assert "0: Card, compute capability 9.0, 80 GiB" in text
    assert "  compute capability 9.0: nothing measured: ask for them by name" in text
    facts["measured"] = {"9.0": 12, "8.0": 1}
    text = info.to_text(facts)
    assert "  compute capability 9.0: 12 problems measured" in text
    assert "compute capability 8.0" not in text
