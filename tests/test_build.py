"""The build's decisions, the sources it packs, and what the native module may depend on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import xattn_kernels
import xattn_models
from xattn_build import cuda, native, nvcc
from xattn_kernels import build_record
from xattn_kernels.engines import native as loader

ROOT = Path(__file__).resolve().parents[1]
KNOWN = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


class TestArchitectures:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("80", ("80-real",)),
            ("80,86;90a", ("80-real", "86-real", "90a-real")),
            ("8.0 8.6+PTX", ("80-real", "86")),
            ("9.0a;12.0+PTX", ("90a-real", "120")),
            ("80-real,120-virtual", ("80-real", "120-virtual")),
            ("80,80", ("80-real",)),
        ],
    )
    def test_parse(self, text: str, expected: tuple[str, ...]) -> None:
        assert cuda.parse_archs(text, "X") == expected

    @pytest.mark.parametrize("text", ["Ampere", "8", "sm_80", "80,,x", "-1"])
    def test_parse_names_what_is_wrong(self, text: str) -> None:
        with pytest.raises(cuda.BuildError, match="XATTN_CUDA_ARCHS"):
            cuda.parse_archs(text, "XATTN_CUDA_ARCHS")

    @pytest.mark.parametrize(
        ("env", "gpus", "expected"),
        [
            ({}, (), ("80-real", "86-real", "89-real", "90a-real", "100-real", "120")),
            ({}, ("90",), ("90a-real",)),
            ({}, ("86", "120"), ("86-real", "120-real")),
            ({}, ("61",), ("80-real", "86-real", "89-real", "90a-real", "100-real", "120")),
            ({"XATTN_CUDA_ARCHS": "90"}, ("86",), ("90-real",)),
            ({"XATTN_CUDA_ARCHS": "80", "TORCH_CUDA_ARCH_LIST": "8.6"}, (), ("80-real",)),
            (
                {"TORCH_CUDA_ARCH_LIST": "7.0 8.0 9.0+PTX"},
                (),
                ("80-real", "90a-real", "90-virtual"),
            ),
            (
                {"TORCH_CUDA_ARCH_LIST": "8.9", "CMAKE_CUDA_ARCHITECTURES": "80"},
                (),
                ("89-real",),
            ),
            ({"CMAKE_CUDA_ARCHITECTURES": "native"}, (), ("native",)),
            ({"CMAKE_CUDA_ARCHITECTURES": "80-real;90"}, (), ("80-real", "90")),
        ],
    )
    def test_choice(
        self, env: dict[str, str], gpus: tuple[str, ...], expected: tuple[str, ...]
    ) -> None:
        assert cuda.choose_archs(env, gpus, KNOWN)[0] == expected

    def test_default_shrinks_to_what_the_compiler_knows(self) -> None:
        archs, notes = cuda.choose_archs({}, (), (80, 86, 89, 90))
        assert archs == ("80-real", "86-real", "89-real", "90a")
        assert len(notes) == 2

    @pytest.mark.parametrize(
        "env", [{"XATTN_CUDA_ARCHS": "70"}, {"TORCH_CUDA_ARCH_LIST": "6.1;7.0"}]
    )
    def test_too_old(self, env: dict[str, str]) -> None:
        with pytest.raises(cuda.BuildError, match=next(iter(env))):
            cuda.choose_archs(env, (), KNOWN)


class TestPlan:
    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        """No driver, no GPU and no nvcc, until a test says otherwise."""
        monkeypatch.setattr(cuda, "driver_present", lambda: False)
        monkeypatch.setattr(cuda, "driver_cuda_version", lambda: None)
        monkeypatch.setattr(cuda, "detected_archs", lambda: ("90",))
        monkeypatch.setattr(cuda, "find_nvcc", lambda env: None)
        monkeypatch.setattr(cuda, "nvcc_archs", lambda nvcc: KNOWN)
        return monkeypatch

    def test_bare_machine(self, machine: pytest.MonkeyPatch) -> None:
        plan = cuda.make_plan({})
        assert not plan.build
        assert not plan.worth_a_warning
        assert cuda.extra_build_requirements({}) == []

    def test_driver_and_compiler(self, machine: pytest.MonkeyPatch) -> None:
        machine.setattr(cuda, "driver_present", lambda: True)
        machine.setattr(cuda, "find_nvcc", lambda env: "/nvcc")
        plan = cuda.make_plan({})
        assert (plan.build, plan.nvcc, plan.archs) == (True, "/nvcc", ("90a-real",))
        assert cuda.extra_build_requirements({}) == []

    def test_switched_off(self, machine: pytest.MonkeyPatch) -> None:
        machine.setattr(cuda, "driver_present", lambda: True)
        plan = cuda.make_plan({"XATTN_CUDA": "0"})
        assert plan.reason == "switched off by XATTN_CUDA=0"
        assert cuda.extra_build_requirements({"XATTN_CUDA": "0"}) == []

    @pytest.mark.parametrize("mode", ["auto", "1"])
    def test_driver_without_compiler_asks_for_the_wheels(
        self, machine: pytest.MonkeyPatch, mode: str
    ) -> None:
        machine.setattr(cuda, "driver_present", lambda: True)
        assert cuda.extra_build_requirements({"XATTN_CUDA": mode}) == list(cuda.NVCC_WHEELS)

    def test_old_driver_does_not(self, machine: pytest.MonkeyPatch) -> None:
        machine.setattr(cuda, "driver_present", lambda: True)
        machine.setattr(cuda, "driver_cuda_version", lambda: (12, 8))
        assert cuda.extra_build_requirements({}) == []
        plan = cuda.make_plan({})
        assert plan.worth_a_warning
        assert "too old for nvcc 13" in str(plan.reason)

    def test_demanded_without_compiler(self, machine: pytest.MonkeyPatch) -> None:
        with pytest.raises(cuda.BuildError, match="no nvcc was found"):
            cuda.make_plan({"XATTN_CUDA": "1"})

    def test_compiler_without_driver(self, machine: pytest.MonkeyPatch) -> None:
        machine.setattr(cuda, "find_nvcc", lambda env: "/nvcc")
        plan = cuda.make_plan({})
        assert not plan.build
        assert "no GPU driver was found" in str(plan.reason)
        assert cuda.make_plan({"XATTN_CUDA": "1"}).build
        assert cuda.make_plan({"XATTN_CUDA_ARCHS": "90a"}).archs == ("90a-real",)

    def test_unknown_mode(self, machine: pytest.MonkeyPatch) -> None:
        with pytest.raises(cuda.BuildError, match="expected auto, 1 or 0"):
            cuda.make_plan({"XATTN_CUDA": "perhaps"})


class TestCompilerSearch:
    def test_order(self, tmp_path: Path) -> None:
        chosen = executable(tmp_path / "chosen" / "nvcc-13")
        home = executable(tmp_path / "home" / "bin" / "nvcc")
        on_path = executable(tmp_path / "path" / "nvcc")
        env = {
            "CUDACXX": str(chosen),
            "CUDA_HOME": str(tmp_path / "home"),
            "PATH": str(on_path.parent),
        }
        assert cuda.find_nvcc(env) == str(chosen)
        del env["CUDACXX"]
        assert cuda.find_nvcc(env) == str(home)
        env["CUDA_HOME"] = str(tmp_path / "nothing")
        assert cuda.find_nvcc(env) == str(on_path)

    def test_libraries_of_the_wheels(self, tmp_path: Path) -> None:
        """Named to the linker where the compiler would not look; a toolkit's are left to it."""
        nvcc = str(executable(tmp_path / "cu13" / "bin" / "nvcc"))
        assert cuda.library_environment(nvcc, {"A": "b"}) == {"A": "b"}
        library = tmp_path / "cu13" / "lib"
        library.mkdir()
        (library / "libcudart_static.a").touch()
        assert cuda.library_environment(nvcc, {}) == {"LIBRARY_PATH": str(library)}
        found = cuda.library_environment(nvcc, {"LIBRARY_PATH": "/mine"})["LIBRARY_PATH"]
        assert found == f"{library}{os.pathsep}/mine"
        (tmp_path / "cu13" / "lib64").mkdir()
        assert cuda.library_environment(nvcc, {}) == {}

    def test_wrong_choice_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(cuda.BuildError, match="CUDACXX"):
            cuda.find_nvcc({"CUDACXX": str(tmp_path / "nvcc"), "PATH": ""})

    def test_no_host_compiler(self, tmp_path: Path) -> None:
        with pytest.raises(cuda.BuildError, match="no C\\+\\+ compiler was found"):
            native.check_host({"PATH": str(tmp_path)})
        with pytest.raises(cuda.BuildError, match="CXX='mine -m64'"):
            native.check_host({"PATH": str(tmp_path), "CXX": "mine -m64"})

    def test_message_reaches_the_user(self, tmp_path: Path) -> None:
        result = run_setup("build_ext", "--build-temp", str(tmp_path), PATH=str(tmp_path), CXX="")
        assert result.returncode != 0
        assert "error: xattn_kernels: no C++ compiler was found" in result.stderr
        assert "Traceback" not in result.stderr


class TestJobs:
    def write(self, root: Path, available_kib: int, limit: str) -> Path:
        (root / "proc").mkdir()
        (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available_kib} kB\n")
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
        (root / "sys/fs/cgroup/memory.current").write_text("1024\n")
        return root

    @pytest.mark.parametrize(("limit", "expected"), [("max", 4096), ("3072", 2048), ("9", 0)])
    def test_free_memory(self, tmp_path: Path, limit: str, expected: int) -> None:
        assert native.free_memory(self.write(tmp_path, 4, limit)) == expected

    def test_unknown_memory(self, tmp_path: Path) -> None:
        assert native.free_memory(tmp_path) is None

    def test_bounded_by_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
        monkeypatch.setattr(native, "free_memory", lambda: 8 << 30)
        assert native.parallel_jobs({}, cuda=False) == 8
        assert native.parallel_jobs({}, cuda=True) == 4
        assert native.parallel_jobs({"MAX_JOBS": "3"}, cuda=False) == 3
        monkeypatch.setattr(native, "free_memory", lambda: 0)
        assert native.parallel_jobs({}, cuda=False) == 1

    def test_bad_override(self) -> None:
        with pytest.raises(cuda.BuildError, match="MAX_JOBS='0'"):
            native.parallel_jobs({"MAX_JOBS": "0"}, cuda=False)


class TestCompilerByHand:
    """`xattn_build.nvcc` compiles what CMake compiles, in the same way."""

    @pytest.mark.parametrize(
        ("archs", "expected"),
        [
            (["80-real"], ["-gencode=arch=compute_80,code=[sm_80]"]),
            (
                ["90a-real", "120"],
                [
                    "-gencode=arch=compute_90a,code=[sm_90a]",
                    "-gencode=arch=compute_120,code=[compute_120,sm_120]",
                ],
            ),
            (["90-virtual"], ["-gencode=arch=compute_90,code=[compute_90]"]),
            (
                ["80-real", "90-real", "89-real", "86"],
                [
                    "-gencode=arch=compute_80,code=[sm_80,sm_89]",
                    "-gencode=arch=compute_90,code=[sm_90]",
                    "-gencode=arch=compute_86,code=[compute_86,sm_86]",
                ],
            ),
        ],
    )
    def test_architectures(self, archs: list[str], expected: list[str]) -> None:
        assert nvcc.code_of(archs) == expected

    def test_words_are_refused(self) -> None:
        with pytest.raises(cuda.BuildError, match="'native' is not an architecture"):
            nvcc.code_of(["native"])

    def test_strict_and_compressed(self) -> None:
        for flag in ("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-std=c++17"):
            assert flag in nvcc.flags()
        assert not any(flag.startswith("#") for flag in nvcc.flags())

    def test_module(self, tmp_path: Path) -> None:
        """Every source once; files for 90a alone are for nothing else where 90a is asked for."""
        commands: list[list[str]] = []
        module = nvcc.build_module(
            "nvcc", ["80-real", "90a-real"], tmp_path, "1.2", [Path("/pybind")], 2, commands.append
        )
        assert module.parent == tmp_path and module.name.startswith("_cuda.")
        *compiled, linked = sorted(commands, key=lambda command: "-shared" in command)
        assert {Path(command[-3]) for command in compiled} == {*nvcc.sources(), *nvcc.HOST_SOURCES}
        assert {command[-1] for command in compiled} == {x for x in linked if x.endswith(".o")}
        assert "-cudart=static" in linked and linked[-1] == str(module)
        for command in compiled:
            special = Path(command[-3]).stem.endswith("_sm90")
            kernels = command[-3].endswith(".cu")
            assert ("-gencode=arch=compute_80,code=[sm_80]" in command) == (kernels != special)
            assert ("-DXATTN_HAVE_SM90A=1" in command) == kernels
            assert ('-DXATTN_VERSION="1.2"' in command) != kernels
        command = nvcc.kernel_command("nvcc", Path("a_sm90.cu"), Path("a.o"), ["80-real", "120"])
        assert set(nvcc.code_of(["80-real", "120"])) <= set(command)
        assert "-DXATTN_HAVE_SM90A=1" not in command
        command = nvcc.kernel_command("nvcc", Path("a_sm90.cu"), Path("a.o"), ["80-real", "90a"])
        assert "-gencode=arch=compute_80,code=[sm_80]" not in command

    def test_failure_says_what_the_compiler_said(self, tmp_path: Path) -> None:
        broken = executable(tmp_path / "bin" / "nvcc")
        broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 3\n")
        with pytest.raises(cuda.BuildError, match=r"failed \(3\):\nno such luck"):
            nvcc.build_module(str(broken), ["80-real"], tmp_path, "1", [])

    @pytest.mark.parametrize(
        "archs", [("80-real", "89-real", "90a-real", "120"), ("86-real",), ("90-virtual",)]
    )
    def test_as_cmake_does(self, tmp_path: Path, archs: tuple[str, ...]) -> None:
        compiler = cuda.find_nvcc(os.environ)
        assert compiler is not None, "make setup installs one"
        done = subprocess.run(
            [
                native._tool("cmake"),
                *("-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DXATTN_CUDA=ON"),
                f"-DCMAKE_MAKE_PROGRAM={native._tool('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={native._pybind11_dir()}",
                f"-DCMAKE_CUDA_COMPILER={compiler}",
                f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(archs)}",
            ],
            env=cuda.library_environment(compiler, os.environ),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        entries = json.loads((tmp_path / "compile_commands.json").read_text())
        by_cmake = {
            Path(entry["file"]): shlex.split(entry["command"])
            for entry in entries
            if entry["file"].endswith(".cu")
        }
        assert set(by_cmake) == set(nvcc.sources())
        for source, command in by_cmake.items():
            by_hand = nvcc.kernel_command(compiler, source, Path(command[-1]), archs)
            assert normal(by_hand) == normal(command)


def normal(command: list[str]) -> set[str]:
    """The flags of a command that matter, one way of writing each."""
    found = set()
    for word in command[1:]:
        word = word.replace("--generate-code=", "-gencode=")
        if word.startswith("-Xcompiler="):
            found |= {f"-Xcompiler={flag}" for flag in word.partition("=")[2].split(",")}
        elif word.startswith("-") and word not in ("-c", "-o", "-x", "-MD", "-MT", "-MF"):
            found.add(word)
    return found - {"-forward-unknown-to-host-compiler"}


class TestPackages:
    def test_library_folders(self, tmp_path: Path) -> None:
        result = run_setup("--quiet", "build_py", "--build-lib", str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert {path.name for path in tmp_path.iterdir()} == {
            "xattn_benchmarks",
            "xattn_kernels",
            "xattn_models",
        }
        files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
        data = {path.as_posix() for path in files if path.suffix not in (".py", ".pyi")}
        assert data == {
            "xattn_benchmarks/report.html.jinja",
            "xattn_kernels/measured.json",
            "xattn_kernels/py.typed",
            "xattn_kernels/engines/triton/tiles.json",
        }

    def test_source_archive_is_complete(self, tmp_path: Path) -> None:
        result = run_setup(
            "--quiet", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)
        )
        assert result.returncode == 0, result.stderr
        with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
            packed = {name.partition("/")[2] for name in archive.getnames()}
        folders = ("build_backend", "cmake", "csrc", "models", "tests", "xattn_kernels")
        sources = [ROOT / name for name in ("CMakeLists.txt", "Makefile", "setup.py", "LICENSE")]
        for folder in folders:
            sources += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        wanted = {
            str(path.relative_to(ROOT))
            for path in sources
            if path.suffix not in (".pyc", ".so") and path.name != native.RECORD
        }
        assert wanted <= packed
        assert not [name for name in packed if name.endswith((".so", native.RECORD))]

    def test_one_version(self) -> None:
        version = xattn_kernels.__version__
        assert importlib.metadata.version("xattn_kernels") == version
        assert xattn_models.__version__ == version
        record = build_record.read()
        assert record is not None
        assert record["version"] == version


class TestModule:
    @pytest.fixture
    def module(self) -> str:
        return str(loader.core().__file__)

    def test_needs_neither_torch_nor_a_build_folder(self, module: str) -> None:
        dynamic = subprocess.run(
            ["readelf", "--dynamic", "--wide", module], capture_output=True, text=True, check=True
        ).stdout
        assert "NEEDED" in dynamic
        for word in ("torch", "c10", "cuda", "RPATH", "RUNPATH"):
            assert word not in dynamic

    def test_exports_only_its_entry_point(self, module: str) -> None:
        symbols = subprocess.run(
            ["nm", "--dynamic", "--defined-only", module],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__core"]

    def test_record_agrees_with_the_module(self) -> None:
        record = build_record.read()
        assert record is not None
        assert sorted(record["cpu"]["isas"]) == sorted(loader.core().cpu_info()["compiled"])

    def test_subnormals_survive_loading(self) -> None:
        loader.core()
        smallest = torch.full((1,), 1e-40)
        assert (smallest * 0.5).item() > 0
        assert torch.equal(smallest, torch.full((1,), 2e-40) * 0.5)
