"""Every suite runs and fills its tables, on the smallest problems it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import environment
from benchmarks.core import PRESETS, Result
from benchmarks.problems import SCHEDULE, OpByOpSet, Scale
from benchmarks.suites import cam, cam_memory, linear, recompute, softmax
from xattn_kernels.cost import NYUD_V2
from xattn_kernels.functional import cross_attention_block

SMOKE = PRESETS["smoke"]


def complete(result: Result, *, without: tuple[str, ...] = ()) -> None:
    assert result.failure is None and result.rows and result.notes
    columns = {name for row in result.rows for name in row}
    assert columns == set(result.columns) - set(without)
    assert all(bar.value is not None or bar.note for bar in result.bars)


def quiet(text: str) -> None:
    assert text


def test_scales_are_those_of_the_cost_model() -> None:
    for number, size in enumerate(NYUD_V2.sizes):
        [features, *_] = Scale(number).features()
        assert features.shape[1] == size.width
        assert features.shape[2] * features.shape[3] == size.tokens


def test_folded_weights_are_those_of_the_modules() -> None:
    model = OpByOpSet(5)
    features = [torch.randn(2, 5, 3, 4) for _ in range(4)]
    with torch.no_grad():
        expected = model(features)
    outputs = cross_attention_block(features, *model.folded(), SCHEDULE)
    for x, y in zip(outputs, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_cam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cam, "SCALES", (3,))
    monkeypatch.setattr(environment, "compiler_error", lambda: "no compiler today")
    monkeypatch.setattr(cam, "_bf16_error", lambda: None)
    result = cam.run(SMOKE, quiet)
    complete(result, without=(cam.COMPILED, cam.VS_COMPILED))
    assert "Without compiled: no compiler today." in result.notes
    assert len(result.bars) == 6


def test_cam_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cam, "SCALES", (3,))
    monkeypatch.setattr(environment, "compiler_error", lambda: "no compiler today")
    monkeypatch.setattr(cam, "_bf16_error", lambda: "an old CPU")
    result = cam.run(SMOKE, quiet)
    assert "Without fused bf16: an old CPU." in result.notes
    assert result.bars[-1].value is None


def test_cam_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cam_memory, "SCALES", (2,))
    result = cam_memory.run(SMOKE, quiet)
    complete(result)
    [row] = result.rows
    assert row["features"] == pytest.approx(4 * 4 * 144 * 1200 / 2**20)
    assert row["outputs"] == pytest.approx(3 * row["features"])
    # Outputs are written, so they are resident; a little more for what was there before.
    assert row["rise"] > 0.9 * row["outputs"]


class SmallScale(Scale):
    """A scale whose checks take no time."""

    width = 8
    shape = (6, 8)


@pytest.fixture
def small_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "Scale", SmallScale)
    monkeypatch.setattr(recompute, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(environment, "compiler_error", lambda: "no compiler today")


@pytest.mark.usefixtures("small_training")
def test_training() -> None:
    result = recompute.run(SMOKE, quiet, scales=(0,))
    complete(result)
    by_op, stored, ours = (row[recompute.SAVED] for row in result.rows)
    assert 0 < ours < stored < by_op
    bars = {bar.name: bar for bar in result.bars}
    assert bars["training CTAM, scale 0, torch.compile / ours"].note == "no compiler today"
    assert {plot.kind for plot in result.plots} == {"bars", "lines"}


def test_memory_of_a_training_step() -> None:
    rise = recompute.in_fresh_process(recompute.rise_bytes, recompute.RECOMPUTED, 3, 1)
    step = recompute.Step(recompute.RECOMPUTED, 3, 1)
    assert rise > sum(4 * x.numel() for x in step.module.parameters())


def test_saved_bytes_of_the_pairs_are_constant_in_the_targets() -> None:
    saved = [recompute.saved_by_targets(targets, 0, 1, "cpu") for targets in (2, 4)]
    maps = recompute.MAPS * 4 * 36 * 19200
    assert maps <= min(saved) and max(saved) < 1.03 * maps


def test_backward_is_measured_alone() -> None:
    step = recompute.Step(recompute.RECOMPUTED, 3, 2)
    backward = step.backward()
    first, second = backward(), backward()
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y)


def test_softmax() -> None:
    complete(softmax.run(SMOKE, quiet, tokens=70))


def test_linear() -> None:
    result = linear.run(SMOKE, quiet, all_tokens=(64, 128, 256))
    complete(result)
    assert [row["tokens"] for row in result.rows] == [64, 128, 256]


def off_by_a_thousandth(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **options: Any) -> Any:
        return [1.001 * x for x in function(*args, **options)]

    return wrong


@pytest.mark.parametrize(
    ("suite", "name", "run"),
    [
        (softmax, "softmax_cross_attention", lambda: softmax.run(SMOKE, quiet, tokens=70)),
        (linear, "linear_cross_attention", lambda: linear.run(SMOKE, quiet, all_tokens=(64,))),
        (cam, "cross_attention_block", lambda: cam.run(SMOKE, quiet)),
    ],
)
def test_wrong_results_are_not_timed(
    suite: Any, name: str, run: Callable[[], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(*_: Any, **__: Any) -> None:
        raise RuntimeError("timed")

    monkeypatch.setattr(suite, name, off_by_a_thousandth(getattr(suite, name)))
    monkeypatch.setattr(suite, "measured", timed)
    if suite is cam:
        monkeypatch.setattr(cam, "SCALES", (3,))
        monkeypatch.setattr(environment, "compiler_error", lambda: "not now")
    with pytest.raises(AssertionError, match=r"largest error|relative L2"):
        run()


@pytest.mark.usefixtures("small_training")
def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(recompute.Step):
        def results(self) -> dict[str, torch.Tensor]:
            found = super().results()
            if self.way == recompute.RECOMPUTED:
                found["gradient depth"] *= 1.01
            return found

    monkeypatch.setattr(recompute, "Step", Wrong)
    with pytest.raises(AssertionError, match="ours, gradient depth: relative L2 error"):
        recompute.run(SMOKE, quiet, scales=(0,))
