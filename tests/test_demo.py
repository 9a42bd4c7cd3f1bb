"""The demo: photographs of every kind, what it counts, and that nothing wrong is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress

from xattn_kernels import cost
from xattn_models import images

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.append(str(EXAMPLES))

import demo  # noqa: E402
import demo_figure  # noqa: E402
import demo_inputs  # noqa: E402
import demo_measure  # noqa: E402
import demo_ways  # noqa: E402

# Photographs


def test_bundled_photograph() -> None:
    photograph = demo_inputs.bundled_photograph()
    assert photograph.mode == "RGB" and photograph.size == (640, 427)


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 255, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("LA", (77, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_modes_of_images(
    mode: str, pixel: int | tuple[int, ...], expected: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    Image.new(mode, (5, 4), pixel).save(path)
    photograph = images.open_image(path)
    assert photograph.mode == "RGB" and photograph.size == (5, 4)
    assert photograph.getpixel((2, 2)) == expected


def test_cmyk(tmp_path: Path) -> None:
    path = tmp_path / "image.tiff"
    Image.new("CMYK", (5, 4), (0, 0, 0, 255)).save(path)
    assert images.open_image(path).getpixel((0, 0)) == (0, 0, 0)


def test_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    assert images.open_image(path).size == (20, 40)


def _write_nothing(path: Path) -> None:
    """Leave the path without a file."""


def _write_text(path: Path) -> None:
    path.write_text("no image")


def _write_truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:2000])


def _write_floats(path: Path) -> None:
    Image.new("F", (5, 4)).save(path, format="TIFF")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_write_nothing, "does not exist"),
        (Path.mkdir, "is no file"),
        (Path.touch, "cannot be read as an image"),
        (_write_text, "cannot be read as an image"),
        (_write_truncated, "cannot be read as an image"),
        (_write_floats, "floating-point"),
    ],
)
def test_unusable_images_are_named(
    write: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(write)
    path = tmp_path / "image"
    write(path)
    with pytest.raises(images.ImageError, match=message):
        images.open_image(path)
    assert demo.main(["--image", str(path), "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr().out
    assert str(path) in output.replace("\n", "") and "Traceback" not in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(1, 1), (3000, 10), (640, 427)])
def test_every_size_is_made_to_fit(size: tuple[int, int]) -> None:
    assert demo_inputs.fit(Image.new("RGB", size), (96, 128)).size == (128, 96)


# The three ways

WIDTHS = (4, 6)


def features(height: int = 8, width: int = 8) -> demo_ways.Features:
    generator = torch.Generator().manual_seed(0)
    return {
        task: [
            torch.randn(1, c, height >> s, width >> s, generator=generator)
            for s, c in enumerate(WIDTHS)
        ]
        for task in demo_inputs.TASKS
    }


def test_number_of_outputs() -> None:
    given = features()
    tasks, scales = len(given), len(WIDTHS)
    for way in (demo_ways.OpByOp, demo_ways.Fused):
        assert len(way(WIDTHS)(given)) == tasks * scales + tasks * scales * (scales - 1) // 2
    cells = tasks * scales
    assert len(demo_ways.NaiveAllPairs(WIDTHS)(given)) == cells * (cells - 1)


def test_formulas_are_those_of_the_cost_model() -> None:
    sizes = cost.NYUD_V2.sizes
    by_op, fused, naive = (demo_ways.formula(way, sizes) for way in demo_ways.WAYS)
    assert (fused.pairs, by_op.pairs, naive.pairs) == (72, 72, 240)
    assert by_op.flops == round(21.4368768e9) + cost.fuse_block_flops(4, sizes)
    assert fused.flops < by_op.flops < naive.flops
    assert naive.peak_bytes > 2 * 4 * 19200**2


def test_a_measured_call_in_this_process(tmp_path: Path) -> None:
    file = tmp_path / "features.pt"
    torch.save(features(64, 64), file)
    for way in demo_ways.WAYS:
        call = demo_ways.measured_call(way, file, 0)
        assert call.seconds > 0 and call.rise_bytes >= 0


# What is measured and what is modelled


def run_of(
    folder: Path, naive_seconds: float, heights: tuple[int, ...] = (8, 16)
) -> demo_measure.Run:
    run = demo_measure.Run(Progress(disable=True), len(heights), folder, naive_seconds)
    for height in heights:
        run.features((height, height), features(height, height))
    return run


def instant(self: object, size: tuple[int, int], scale: int) -> demo_ways.Call:
    return demo_ways.Call(1.0, 1000, 0, "none")


def test_naive_is_measured_while_time_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_measure.Run, "_call_naive", instant)
    run = run_of(tmp_path, 1000.0)
    run.measure_naive()
    assert [(p.size, p.measured, p.scales) for p in run.points] == [
        ((8, 8), True, (0, 1)),
        ((16, 16), True, (0, 1)),
    ]


def test_naive_is_modelled_beyond_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_measure.Run, "_call_naive", instant)
    run = run_of(tmp_path, 1.5)
    run.measure_naive()
    small, coarse, large = run.points
    assert small.measured and not large.measured
    assert coarse.measured and coarse.size == (16, 16) and coarse.scales == (1, 1)
    assert large.seconds == pytest.approx(large.gflop / small.gflop)
    assert large.pairs == small.pairs > coarse.pairs


def test_naive_is_modelled_beyond_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = demo_ways.sizes_of(features(8, 8))
    enough = demo_ways.formula(demo_measure.NAIVE, sizes).peak_bytes / demo_measure.MEMORY_SHARE
    monkeypatch.setattr(demo_measure, "available_bytes", lambda: enough + 1)
    monkeypatch.setattr(demo_measure.Run, "_call_naive", instant)
    run = run_of(tmp_path, 1000.0)
    run.measure_naive()
    assert [p.measured for p in run.points if p.scales == (0, 1)] == [True, False]


def test_fused_is_checked_before_it_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(self: demo_ways.Sequential, given: demo_ways.Features) -> list[torch.Tensor]:
        return [1.0001 * x for x in demo_ways.Sequential.forward(self, given)]

    monkeypatch.setattr(demo_ways.Fused, "forward", off)
    run = run_of(tmp_path, 0.0)
    with pytest.raises(AssertionError, match="output 0"):
        run.verify_and_time()
    assert run.points == []


def test_a_smooth_picture_is_accepted() -> None:
    """Rounding errors of the fuse block's convolutions do not average out over its pixels."""
    sums = np.linspace(0, 255, 120)[:, None] + np.linspace(0, 255, 160)
    ramp = Image.fromarray((sums / 2).astype(np.uint8)).convert("RGB")
    given = demo_inputs.FeatureExtractor()(demo_inputs.fit(ramp, (288, 384)))
    widths = [size.width for size in demo_ways.sizes_of(given)]
    errors = demo_measure._verify(demo_ways.OpByOp(widths), demo_ways.Fused(widths), given)
    assert max(errors.values()) < 1e-5


def test_picture_tells_measured_from_modelled(tmp_path: Path) -> None:
    points = [
        {"way": way, "size": size, "scales": (0, 3), "seconds": 1.0, "peak_bytes": 1, "measured": m}
        for way in demo_figure.COLOURS
        for size, m in (((96, 128), True), ((480, 640), way != demo_measure.NAIVE))
    ]
    facts = {"tasks": ["a"], "threads": 1, "processor": "CPU"}
    report = {"points": points, "facts": facts}
    demo_figure.draw(tmp_path / "demo.png", Image.new("RGB", (8, 6)), report)
    assert Image.open(tmp_path / "demo.png").size > (1000, 300)


def test_demo_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--height", "96", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for word in ("op by op", "fused", "naive all-pairs", "GFLOP", "peak memory", "backbone"):
        assert word in done.stdout
    report = json.loads((tmp_path / "demo.json").read_text())
    assert {point["way"] for point in report["points"]} == set(demo_ways.WAYS)
    assert all(point["seconds"] > 0 and point["measured"] for point in report["points"])
    assert (tmp_path / "demo.png").stat().st_size > 10_000
