"""The table of measured engines: what ``auto`` makes of it, and how it comes from a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import xattn_kernels as xk
from xattn_kernels import measured, registry
from xattn_kernels.problem import ENGINES, MEASURED_ENGINES, OPERATORS, Problem

LINEAR = "linear_cross_attention"
SOFTMAX = "softmax_cross_attention"


def row(
    times: dict[str, float],
    channels: int = 36,
    op: str = LINEAR,
    dtype: str = "bfloat16",
    gradient: bool = False,
    capability: str = "9.0",
    tokens: int = 19200,
) -> dict[str, Any]:
    return {
        "capability": capability,
        "op": op,
        "dtype": dtype,
        "channels": channels,
        "gradient": gradient,
        "tokens": tokens,
        "microseconds": times,
    }


def problem(channels: int = 36, op: str = LINEAR, **fields: Any) -> Problem:
    return Problem(op, torch.bfloat16, "cuda", channels, channels, **fields)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a table of rows in the place of the shipped one, on a machine with an H200."""
    file = tmp_path / "measured.json"

    def write(*rows: dict[str, Any]) -> None:
        file.write_text(json.dumps({"about": "", "cards": [], "entries": rows}))
        measured.entries.cache_clear()
        registry._explain.cache_clear()

    monkeypatch.setattr(measured, "FILE", file)
    monkeypatch.setattr(
        registry, "capability", lambda problem: "9.0" if problem.device == "cuda" else None
    )
    refusals = {"cpu": ("runs on CPU tensors",)}
    monkeypatch.setattr(registry, "_refusals", lambda name, problem: refusals.get(name, ()))
    monkeypatch.setattr(registry, "_test_refusals", refusals, raising=False)
    write()
    yield write
    monkeypatch.undo()
    measured.entries.cache_clear()
    registry._explain.cache_clear()


def refuse(name: str, reason: str) -> None:
    registry._test_refusals[name] = (reason,)  # type: ignore[attr-defined]


def test_shipped_table() -> None:
    """Well formed, of engines and operators that exist, and written by this code."""
    text = measured.FILE.read_text()
    written = json.loads(text)
    assert measured.to_text(written) == text
    for entry in measured.entries():
        assert entry.key.op in OPERATORS
        assert set(entry.microseconds) <= set(ENGINES)
    known = {card["capability"] for card in written["cards"]}
    assert set(measured.capabilities()) <= known


def test_without_measurements(table: Callable[..., None]) -> None:
    explanation = xk.explain(problem())
    assert explanation.engine == "reference"
    for name in MEASURED_ENGINES:
        assert explanation.reasons[name] == ()
        assert (
            f"  {name}: could run; never measured on compute capability 9.0; ask for it by name"
            in str(explanation)
        )
    for name in MEASURED_ENGINES:
        with xk.backend(name):
            assert registry.select(problem()) == name
            assert "reference: could run, was not asked for" in str(xk.explain(problem()))


def test_the_fastest_measured_engine_runs(table: Callable[..., None]) -> None:
    table(row({"cuda": 50.0, "triton": 80.0}), row({"cuda": 90.0, "triton": 60.5}, channels=288))
    explanation = xk.explain(problem())
    assert explanation.engine == "cuda"
    text = str(explanation)
    assert "  cuda: runs; measured 50 us on compute capability 9.0 with C=36, N=19200" in text
    assert "  triton: could run; measured 80 us" in text
    assert "  reference: could run, comes later" in text
    assert registry.select(problem(288)) == "triton"
    assert "triton: runs; measured 60.5 us" in str(xk.explain(problem(288)))


def test_the_plain_engine_may_be_the_fastest(table: Callable[..., None]) -> None:
    table(row({"cuda": 50.0, "reference": 20.0}))
    assert registry.select(problem()) == "reference"


def test_an_engine_that_refuses_is_passed_over(table: Callable[..., None]) -> None:
    table(row({"cuda": 50.0, "triton": 80.0}))
    refuse("cuda", "not built")
    explanation = xk.explain(problem())
    assert explanation.engine == "triton"
    assert "  cuda: not built" in str(explanation)
    refuse("triton", "has no float64 kernels")
    registry._explain.cache_clear()
    assert registry.select(problem()) == "reference"


def test_one_engine_measured(table: Callable[..., None]) -> None:
    """The other one is not taken when the measured one refuses."""
    table(row({"triton": 80.0}))
    explanation = xk.explain(problem())
    assert explanation.engine == "triton"
    assert (
        "cuda: could run; never measured on compute capability 9.0 for linear_cross_attention in "
        "bfloat16; ask for it by name" in str(explanation)
    )
    refuse("triton", "no")
    registry._explain.cache_clear()
    assert registry.select(problem()) == "reference"


@pytest.mark.parametrize(
    "other",
    [
        {"capability": "8.0"},
        {"op": SOFTMAX},
        {"dtype": "float16"},
        {"gradient": True},
    ],
)
def test_what_an_entry_is_about(table: Callable[..., None], other: dict[str, Any]) -> None:
    table(row({"cuda": 50.0}, **other))
    assert registry.select(problem()) == "reference"
    table(row({"cuda": 50.0}))
    assert registry.select(problem()) == "cuda"


@pytest.mark.parametrize(
    ("channels", "engine"), [(1, "cuda"), (36, "cuda"), (50, "cuda"), (52, "triton"), (999, "cuda")]
)
def test_the_nearest_width_counts(table: Callable[..., None], channels: int, engine: str) -> None:
    """By ratio: 36 sqrt(2) = 50.9 is as near to 36 as to 72."""
    table(
        row({"cuda": 1.0, "triton": 2.0}),
        row({"cuda": 2.0, "triton": 1.0}, channels=72),
        row({"cuda": 1.0, "triton": 2.0}, channels=288),
    )
    assert registry.select(problem(channels)) == engine


def test_heads_count_by_their_width(table: Callable[..., None]) -> None:
    table(
        row({"cuda": 1.0, "triton": 2.0}, op=SOFTMAX),
        row({"cuda": 2.0, "triton": 1.0}, channels=144, op=SOFTMAX),
    )
    assert registry.select(problem(144, SOFTMAX, heads=4)) == "cuda"
    assert registry.select(problem(144, SOFTMAX)) == "triton"


def test_tensors_on_the_cpu_are_left_alone(table: Callable[..., None]) -> None:
    """Also where these engines run on them: in an interpreter or on the twin."""
    table(row({"cuda": 50.0, "triton": 80.0}))
    registry._test_refusals.clear()  # type: ignore[attr-defined]
    explanation = xk.explain(problem()._replace(device="cpu"))
    assert explanation.engine == "cpu"
    assert "cuda: could run; ask for it by name" in str(explanation)


def test_gradients_are_seen(table: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """By explain and by calls alike; the block in training always has them."""
    x = torch.zeros(1, 36, 3)
    seen: list[Problem] = []
    explain = registry._explain

    def spy(problem: Problem, requested: str) -> registry.Explanation:
        seen.append(problem)
        return dataclasses.replace(explain(problem, requested), engine="reference")

    monkeypatch.setattr(registry, "_explain", spy)
    for requires_grad in (False, True):
        key = x.clone().requires_grad_(requires_grad)
        xk.explain(LINEAR, x, key)
        xk.linear_cross_attention(x, key, x)
        with torch.no_grad():
            xk.linear_cross_attention(x, key, x)
    assert [p.gradient for p in seen] == [False, False, False, True, True, False]
    assert "with gradients" in str(explain(seen[3], "auto"))
    xk.explain("cross_attention_block_training", x)
    assert seen[-1].gradient
    monkeypatch.setattr(registry, "_explain", explain)


def test_compiled_calls_choose_alike(
    table: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is a constant of the graph: the table is not read while it runs."""
    monkeypatch.setattr(registry, "capability", lambda problem: "9.0")
    monkeypatch.setattr(
        registry, "_refusals", lambda name, problem: () if name in ("cpu", "reference") else ("no",)
    )
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = torch.randn(1, 36, 5)
    for fastest in ("cpu", "reference"):
        torch._dynamo.reset()
        times = dict.fromkeys(("cpu", "reference"), 2.0) | {fastest: 1.0}
        table(row(times, dtype="float32"))
        compiled = torch.compile(
            lambda x: xk.linear_cross_attention(x, x, x), fullgraph=True, backend=keep
        )
        with torch.no_grad():
            compiled(x)
            table()
            compiled(x)
        calls = [node for node in graphs.pop().graph.nodes if "xattn" in str(node.target)]
        assert [node.args[-1] for node in calls] == (["cpu"] if fastest == "cpu" else [])
        assert graphs == []
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        json.dumps({"entries": [{}]}),
        json.dumps({"entries": [row({"cuda": 0.0})]}),
        json.dumps({"entries": [row({"cuda": 1.0}, channels=0)]}),
        json.dumps({"entries": [row({"cuda": float("nan")})]}),
    ],
)
def test_broken_table(table: Callable[..., None], content: str) -> None:
    measured.FILE.write_text(content)
    measured.entries.cache_clear()
    with pytest.raises(RuntimeError, match=r"measured\.json cannot be read"):
        measured.entries()


# From a run of gpu-check to the table.


def summary(*rows: dict[str, Any], **steps: Any) -> dict[str, Any]:
    card = {"card": "NVIDIA H200", "capability": "9.0", "torch": "2.13.0"}
    return {
        "environment": {"state": "passed", "result": {"rows": [card]}},
        "correct_cuda_linear_bfloat16": {
            "state": "passed",
            "about": {"engine": "cuda", "op": LINEAR, "dtype": "bfloat16"},
        },
        measured.STEP: {"state": "passed", "result": {"rows": list(rows)}},
        **steps,
    }


def test_entries_of_a_run() -> None:
    """Of two rows with one key that with more tokens counts."""
    found = measured.of_summary(
        summary(
            row({"cuda": 9.0}, tokens=300),
            row({"cuda": 50.0, "triton": 80.0}),
            row({"cuda": 8.0}, tokens=400),
        )
    )
    assert [entry.microseconds for entry in found] == [{"cuda": 50.0, "triton": 80.0}]
    assert found[0].fastest_first() == ["cuda", "triton"]


@pytest.mark.parametrize("state", ["failed", "not run"])
def test_what_was_wrong_is_left_out(state: str) -> None:
    about = {"engine": "cuda", "op": LINEAR, "dtype": "bfloat16"}
    found = measured.of_summary(
        summary(
            row({"cuda": 5.0, "triton": 8.0}),
            row({"cuda": 5.0}, channels=72),
            row({"cuda": 5.0}, op=SOFTMAX),
            correct_cuda_linear_bfloat16={"state": state, "about": about},
        )
    )
    assert [(entry.key.op, entry.microseconds) for entry in found] == [
        (LINEAR, {"triton": 8.0}),
        (SOFTMAX, {"cuda": 5.0}),
    ]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new run replaces what it measured again, and keeps other keys and cards."""
    file = tmp_path / "measured.json"
    old = [
        row({"cuda": 7.0}),
        row({"cuda": 6.0}, channels=72),
        row({"triton": 1.0}, capability="8.0"),
    ]
    cards = [{"capability": "8.0", "card": "A100"}, {"capability": "9.0", "card": "H100"}]
    file.write_text(json.dumps({"about": "", "cards": cards, "entries": old}))
    run = tmp_path / "summary.json"
    run.write_text(json.dumps(summary(row({"cuda": 50.126, "triton": 80.0}))))
    assert measured.main([str(run), "--into", str(file)]) == 0
    assert "1 problems measured on NVIDIA H200" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert [card["card"] for card in written["cards"]] == ["A100", "NVIDIA H200"]
    assert [entry["microseconds"] for entry in written["entries"]] == [
        {"triton": 1.0},
        {"cuda": 50.13, "triton": 80.0},
        {"cuda": 6.0},
    ]
    assert measured.to_text(written) == file.read_text()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({}, "no rows of the step"),
        (summary(), "no rows of the step"),
        (summary({"op": LINEAR}), "capability"),
        (summary(row({"cuda": 1.0}, capability="8.0")), "made on 9.0, but has rows of 8.0"),
        (summary(row({"cuda": 1.0}), environment={"state": "failed"}), "on which card"),
        (
            summary(
                row({"cuda": 1.0}),
                x={
                    "state": "failed",
                    "about": {"engine": "cuda", "op": LINEAR, "dtype": "bfloat16"},
                },
            ),
            "all engines were wrong",
        ),
    ],
)
def test_command_says_what_is_wrong(
    run: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, given = tmp_path / "measured.json", tmp_path / "summary.json"
    text = measured.to_text({"about": measured.ABOUT, "cards": [], "entries": []})
    file.write_text(text)
    given.write_text(json.dumps(run))
    assert measured.main([str(given), "--into", str(file)]) == 1
    assert message in capsys.readouterr().out
    assert file.read_text() == text
    assert measured.main([str(tmp_path / "nothing"), "--into", str(file)]) == 1
