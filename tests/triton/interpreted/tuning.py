"""Choice of tiles, with times that are made up, and kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.engines.triton import tuning
from xattn_kernels.engines.triton.tuning import Task

CPU = torch.device("cpu")
TASK = Task("test", (20,), "ieee", (4, "n"), tokens=100, rows=3)


class Tiles(NamedTuple):
    tokens: int
    warps: int


DEFAULT = Tiles(32, 4)
FASTEST = Tiles(64, 4)


def rule(width: int, dot: str, arch: int) -> Tiles:
    assert (width, dot) == (20, "ieee") and arch in (80, 90)
    return DEFAULT


class Clock:
    """Counts launches and measurements, and has ``FASTEST`` take the least time."""

    def __init__(self, fastest: Any = FASTEST) -> None:
        self.fastest = fastest
        self.started: list[Any] = []
        self.measured: list[Any] = []

    def start(self, tiles: Any) -> None:
        self.started.append(tiles)

    def measure(self, start: Callable[[], Any], device: torch.device) -> float:
        start()
        self.measured.append(self.started[-1])
        return 1.0 if self.started[-1] == self.fastest else 2.0


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has chosen nothing yet, tuning on, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("XATTN_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning.set_tuning(True)
    yield
    tuning.set_tuning(None)


def call(monkeypatch: pytest.MonkeyPatch, clock: Clock, task: Task = TASK) -> Any:
    """The tiles of the last launch of a call."""
    monkeypatch.setattr(tuning, "measure", clock.measure)
    tuning.run(task, rule, clock.start, CPU)
    return clock.started[-1]


def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_chosen", {})


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    assert call(monkeypatch, clock) == FASTEST
    assert set(clock.measured) == set(tuning.variations(DEFAULT))
    assert {Tiles(16, 4), Tiles(64, 4), Tiles(32, 8)} < set(clock.measured)


def test_later_calls_run_what_the_first_call_ended_with(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    first = call(monkeypatch, clock)
    launches = len(clock.started)
    other = Clock(fastest=DEFAULT)
    assert call(monkeypatch, other) == first
    tuning.set_tuning(False)
    assert call(monkeypatch, other, TASK._replace(tokens=128)) == first, "a task of like size"
    assert other.started == [first, first] and not other.measured
    assert len(clock.started) == launches
    assert call(monkeypatch, other, TASK._replace(tokens=129)) == DEFAULT


def test_off_nothing_is_measured_read_or_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert call(monkeypatch, Clock()) == FASTEST
    written = files(tmp_path)
    for switch in (False, None):
        for value in ("0", None) if switch is None else ("1",):
            tuning.set_tuning(switch)
            if value is None:
                monkeypatch.delenv("XATTN_TUNE")
            else:
                monkeypatch.setenv("XATTN_TUNE", value)
            restart(monkeypatch)
            clock = Clock()
            assert call(monkeypatch, clock) == DEFAULT
            assert clock.started == [DEFAULT] and not clock.measured
    assert files(tmp_path) == written


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.set_tuning(None)
    assert not tuning.is_tuning()
    monkeypatch.setenv("XATTN_TUNE", "1")
    assert tuning.is_tuning()
    monkeypatch.setenv("XATTN_TUNE", "yes")
    with pytest.raises(ValueError, match="XATTN_TUNE: expected 0 or 1, got 'yes'"):
        tuning.is_tuning()
    with pytest.raises(TypeError, match="enabled: expected True, False or None, got 1"):
        tuning.set_tuning(1)  # type: ignore[arg-type]


def test_a_later_process_reads_what_was_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call(monkeypatch, Clock())
    (file,) = files(tmp_path)
    assert json.loads(file.read_text()) == {
        "task": ["test", 20, "ieee", 4, "n", 7, 2],
        "tiles": {"tokens": 64, "warps": 4},
    }
    restart(monkeypatch)
    clock = Clock(fastest=DEFAULT)
    assert call(monkeypatch, clock) == FASTEST
    assert clock.started == [FASTEST] and not clock.measured


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\x00",
        b"[]",
        b"null",
        b'{"task": ["test", 20, "ieee", 4, "n", 7, 2], "tiles": 3}',
        b'{"task": ["test", 20, "ieee", 4, "n", 7, 2], "tiles": {"tokens": 64}}',
        b'{"task": ["test", 20, "ieee", 4, "n", 7, 2], "tiles": {"tokens": 48, "warps": 4}}',
        b'{"task": ["other"], "tiles": {"tokens": 16, "warps": 4}}',
        b"[" * 100_000,
    ],
)
def test_what_is_not_a_choice_is_replaced(
    content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call(monkeypatch, Clock())
    (file,) = files(tmp_path)
    good = file.read_bytes()
    file.write_bytes(content)
    restart(monkeypatch)
    clock = Clock()
    assert call(monkeypatch, clock) == FASTEST
    assert clock.measured
    assert files(tmp_path) == [file] and file.read_bytes() == good


def test_the_first_of_several_processes_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another process writes its choice while this one measures."""
    clock, other = Clock(), Clock(fastest=Tiles(16, 4))

    def measure(start: Callable[[], Any], device: torch.device) -> float:
        if not clock.measured:
            folder = tuning._folder(tuning._fingerprint(CPU))
            tuning._write(folder, TASK, tuning.variations(DEFAULT), other.fastest)
        return Clock.measure(clock, start, device)

    monkeypatch.setattr(tuning, "measure", measure)
    tuning.run(TASK, rule, clock.start, CPU)
    assert clock.started[-1] == other.fastest
    assert len(files(tmp_path)) == 1, "no temporary file is left"


@pytest.mark.parametrize("obstacle", ["file", "no_home"])
def test_without_a_folder_the_choice_is_this_process_s(
    obstacle: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if obstacle == "file":  # permissions would not stop root
        file = tmp_path / "file"
        file.write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "")

        def home() -> Path:
            raise RuntimeError("no home")

        monkeypatch.setattr(Path, "home", home)
    assert call(monkeypatch, Clock()) == FASTEST
    clock = Clock(fastest=DEFAULT)
    assert call(monkeypatch, clock) == FASTEST
    assert not clock.measured


def test_a_relative_cache_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    call(monkeypatch, Clock())
    assert all(tmp_path / ".cache" in path.parents for path in files(tmp_path))
    assert len(files(tmp_path)) == 1


def test_tiles_that_do_not_fit_or_spill_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    class Spilling:
        n_spills = 4

    class Small(Clock):
        def start(self, tiles: Any) -> Any:
            super().start(tiles)
            if tiles.tokens > 32:
                raise OutOfResources(300_000, 200_000, "shared memory")
            return Spilling() if tiles.warps == 8 else None

    clock = Small()
    assert call(monkeypatch, clock) == DEFAULT
    assert set(clock.measured) == {DEFAULT, Tiles(16, 4)}


def test_the_default_gives_way_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    class Small(Clock):
        def start(self, tiles: Any) -> None:
            super().start(tiles)
            if tiles.tokens > self.limit:
                raise OutOfResources(300_000, 200_000, "shared memory")

        limit = 16

    tuning.set_tuning(False)
    clock = Small()
    assert call(monkeypatch, clock) == Tiles(16, 4)
    assert clock.started == [DEFAULT, Tiles(16, 4)]
    assert call(monkeypatch, clock) == Tiles(16, 4)
    assert len(clock.started) == 3
    restart(monkeypatch)
    clock.limit = 0
    with pytest.raises(OutOfResources):
        call(monkeypatch, clock)


def test_every_kernel_with_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variation of every kernel computes the same, and the last launch is the chosen one."""
    launched: dict[str, list[Any]] = {}
    run = tuning.run

    def watch(task: Task, rule: Any, start: Any, device: torch.device) -> None:
        def watched(tiles: Any) -> Any:
            launched.setdefault(task.kernel, []).append(tiles)
            return start(tiles)

        run(task, rule, watched, device)

    def slowest_first(start: Callable[[], Any], device: torch.device) -> float:
        start()
        count = sum(map(len, launched.values()))
        return 1.0 / count  # what is measured last wins

    monkeypatch.setattr(tuning, "run", watch)
    monkeypatch.setattr(tuning, "measure", slowest_first)

    def results() -> list[Tensor]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 6, 40).requires_grad_() for _ in range(3))
        found = []
        for function in (xk.linear_cross_attention, xk.softmax_cross_attention):
            output = function(q, k, v)
            found += [output, *torch.autograd.grad(output.square().sum(), (q, k, v))]
        weight, bias = torch.randn(2, 5, 6, 6), torch.randn(2, 5, 6)
        with torch.no_grad():
            features = [q.detach(), k.detach()]
            schedule = xk.Schedule.cross_task(2)
            return [*found, *xk.cross_attention_block(features, weight, bias, schedule)]

    tuned = results()
    assert len(launched) == 9
    chosen = {kernel: tiles[-1] for kernel, tiles in launched.items()}
    for kernel, tiles in launched.items():
        assert len(set(tiles)) > 1, kernel
    launched.clear()
    again = results()
    assert {kernel: set(tiles) for kernel, tiles in launched.items()} == {
        kernel: {tiles} for kernel, tiles in chosen.items()
    }
    assert all(map(torch.equal, tuned, again)), "the first call equals later ones"
    tuning.set_tuning(False)
    restart(monkeypatch)
    for x, y in zip(tuned, results(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


TWO = """
import sys, time, torch
from pathlib import Path
from typing import NamedTuple
from xattn_kernels.engines.triton import tuning

class Tiles(NamedTuple):
    tokens: int
    warps: int

mine, flag, other = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
running = []

def measure(start, device):
    start()
    flag.write_text("")
    while not other.exists():
        time.sleep(0.01)
    return 1.0 if running[-1].tokens == mine else 2.0

tuning.measure = measure
task = tuning.Task("test", (20,), "ieee", (4, "n"), 100, 3)
tuning.run(task, lambda *_: Tiles(32, 4), running.append, torch.device("cpu"))
print(running[-1].tokens)
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both measure, of which each prefers other tiles, and both end with the same."""
    flags = [str(tmp_path / name) for name in "ab"]
    env = {**os.environ, "XATTN_TUNE": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, tokens, *order], env=env, stdout=subprocess.PIPE, text=True
        )
        for tokens, order in (("16", flags), ("64", flags[::-1]))
    ]
    found = [process.communicate(timeout=120)[0].split() for process in processes]
    assert found[0] == found[1]
    assert found[0] in (["16"], ["64"])
